"""Quantize: the head's routed experts to INT4 by GPTQ, calibrated on a capture.

First the head is replayed on every captured sequence, which tells what each routed expert sees.
Then, a batch of experts at a time: their Hessians, GPTQ, and the error of every variant on the
same Hessians. A replayed sequence and an expert batch are the units that a killed run keeps, and
that ranks share. Files are read ahead and written behind the computation.

Shape legend: R rows of all sequences, D hidden size, M the experts' intermediate size, K experts a
row.
"""

import json
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_graft.checkpoint import capture as capture_files
from mtp_graft.checkpoint.manifest import finished_result, write_manifest
from mtp_graft.checkpoint.shards import (
    INDEX_NAME,
    num_bytes,
    read_index,
    read_meta,
    save_shard,
    write_json,
)
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.experts import (
    MATRICES,
    RoutedRows,
    expert_errors,
    expert_hessians,
    pack_experts,
    quantize_experts,
)
from mtp_graft.dsv4.variants import VARIANTS, decode_head, is_expert, split_name, store_head
from mtp_graft.errors import GraftError
from mtp_graft.stages.inputs import REPORT_NAME, Progress, cpu_threads
from mtp_graft.stages.overlap import read_ahead, write_behind
from mtp_graft.stages.quantize_job import GPTQ, Job, QuantizeConfig, is_whole, open_job
from mtp_graft.stages.ranks import torchrun_ranks
from mtp_graft.stages.routing import ReplayedRows, replay_capture, to_host

__all__ = ["GPTQ", "QuantizeConfig", "quantize"]

#: Batches of upstream's experts that are read ahead, and written at once: while one is synced,
#: another can be copied.
EXPERTS_AHEAD, EXPERT_WRITERS = 2, 2
#: What the report says of each way to replay.
_REPLAYS = {"true": "true attention", "identity": "attention skipped (identity residual)"}


def quantize(
    capture: Path, upstream: Path, base: Path, out: Path, config: QuantizeConfig, report: Progress
) -> dict[str, Any]:
    """Write GPTQ's experts and the report on all variants to `out`; return the report.

    Goes on where a killed run stopped; the same inputs give the same experts byte for byte, on
    one rank or several (torchrun). Raises GraftError for inputs that do not fit each other, for
    values that are not finite, for a Hessian that damping does not make positive definite, and
    if `out` is of another configuration.
    """
    started = time.perf_counter()
    with torchrun_ranks() as ranks:
        job = open_job(capture, upstream, base, out, config, ranks)
        if (finished := finished_result(out, REPORT_NAME)) is not None:
            return finished
        if config.device != "cpu":
            torch.cuda.reset_peak_memory_stats(job.device)
        pending = [b for b in ranks.share(job.batches()) if not _is_done(job, b)]
        # The first experts come in while the last sequences are replayed.
        ahead = read_ahead(job.expert_tensors, pending, EXPERTS_AHEAD)
        with cpu_threads(config.cpu_threads), ahead as tensors:
            rows = replay_capture(job, report)
            ranks.wait()  # every rank needs every sequence's rows
            _quantize_experts(job, pending, tensors, rows, report)
        result = _summary(job, ranks.gather((job.seconds, _peak_gpu(job), _peak_host())))
        total = result["seconds"]["total"] = time.perf_counter() - started
        if ranks.rank == 0:
            write_json(result, out / REPORT_NAME)
            inputs = [capture / capture_files.INDEX_NAME, upstream / INDEX_NAME, base / INDEX_NAME]
            write_manifest(out, "quantize", asdict(config), inputs, config.device, total)
        ranks.wait()
        return result


# Hessians, GPTQ and errors, a batch of experts at a time


def _quantize_experts(
    job: Job,
    pending: list[range],
    upstream: Iterator[Mapping[str, Tensor]],
    replayed: ReplayedRows,
    report: Progress,
) -> None:
    """Quantize the `pending` batches, writing what is known of each beside it.

    `upstream` gives their tensors.
    """
    total = job.model.n_routed_experts
    done = total - sum(map(len, pending))
    report("gptq", done, total)
    if not pending:
        return
    with job.timed("io"):
        rows = replayed.complete()
    with write_behind(EXPERT_WRITERS) as write:
        for experts in pending:
            with job.timed("io"):
                tensors = next(upstream)
            stored, known = _quantize_batch(job, experts, tensors, rows)
            with job.timed("io"):
                write(_save_batch, job.batch_file(experts), stored, known)
            done += len(experts)
            report("gptq", done, total)


def _is_done(job: Job, experts: range) -> bool:
    file = job.batch_file(experts)
    return is_whole(file) and file.with_suffix(".json").exists()


def _save_batch(path: Path, stored: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
    write_json(known, path.with_suffix(".json"))
    # The experts are written last: where they are, the batch is complete.
    save_shard(to_host(stored), path)


def _quantize_batch(
    job: Job, experts: range, upstream: Mapping[str, Tensor], rows: RoutedRows
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the batch's stored experts, and its token counts and relative errors."""
    rules = job.config.rules()
    counts = [rows.counts[e] for e in experts]
    with job.timed("hessian"), job.products():
        weights = _stacked(decode_head(upstream), experts, job)
        calibrating = [_calibrating_rows(job, rows, e) for e in experts]
        behind = [count or _substituted(job, rows) for count in counts]
        hessians = expert_hessians(calibrating, weights, job.model.swiglu_limit)
    with job.timed("gptq"):
        quantized = quantize_experts(weights, hessians, behind, experts, rules)
    with job.timed("pack"):
        stored = pack_experts(quantized, experts)
    with job.timed("errors"), job.products():
        errors = expert_errors(weights, hessians, quantized, rules.group_size)
    unseen = {m: (hessians[m].diagonal(dim1=1, dim2=2) == 0).sum(1).tolist() for m in MATRICES}
    return stored, {"counts": counts, "rel_errors": errors, "unseen": unseen}


def _calibrating_rows(job: Job, rows: RoutedRows, expert: int) -> Iterable[Tensor]:
    """Return an expert's rows, in parts [T, D]; `zero_tokens` says whose if it has none."""
    if rows.counts[expert]:
        return rows.parts(expert)
    match job.config.zero_tokens:
        case "pool":
            return rows.all_parts()
        case "rtn":
            return ()
        case "error":
            raise GraftError(
                f"{names.HEAD_PREFIX}ffn.experts.{expert}: no token of {job.capture} reached it, "
                "and zero_tokens is 'error'; capture more prompts, or choose 'pool' or 'rtn'"
            )


def _substituted(job: Job, rows: RoutedRows) -> int:
    """Return how many rows stand behind the Hessian of an expert that no token reached."""
    return len(rows.x) if job.config.zero_tokens == "pool" else 0


def _stacked(decoded: Mapping[str, Tensor], experts: range, job: Job) -> dict[str, Tensor]:
    """Return w1 and w3 [E, M, D] and w2 [E, D, M] in float32, for E experts."""
    hidden, inter = job.model.hidden_size, job.model.moe_intermediate_size
    stacked = {}
    for matrix in MATRICES:
        expected = [hidden, inter] if matrix == "w2" else [inter, hidden]
        found = []
        for e in experts:
            name = f"{names.HEAD_PREFIX}ffn.experts.{e}.{matrix}.weight"
            shape = list(decoded[name].shape) if name in decoded else "missing"
            if shape != expected:
                raise GraftError(
                    f"{name}: is {shape}, expected {expected} by the base's config.json; "
                    f"{job.upstream} and {job.base} are of different models"
                )
            found.append(decoded[name])
        stacked[matrix] = torch.stack(found)
    return stacked


# The report


def _summary(job: Job, of_ranks: list[tuple[dict[str, float], int, int]]) -> dict[str, Any]:
    """Return the stage's result, from what is known of every batch, and of every rank."""
    known = [json.loads(job.batch_file(b).with_suffix(".json").read_text()) for b in job.batches()]
    counts: list[int] = [count for batch in known for count in batch["counts"]]
    errors: dict[str, dict[str, list[float]]] = {
        variant: {
            m: [e for batch in known for e in batch["rel_errors"][variant][m]] for m in MATRICES
        }
        for variant in VARIANTS
    }
    config = job.config
    seconds, gpu_bytes, host_bytes = zip(*of_ranks, strict=True)
    return {
        "variants": _variants(job, errors),
        "tokens_per_expert": {
            "min": min(counts),
            "mean": sum(counts) / len(counts),
            "max": max(counts),
            "zero": counts.count(0),
            "counts": counts,
        },
        "rel_errors": errors,
        "zero_token_policy": config.zero_tokens,
        "experts_without_tokens": [e for e, count in enumerate(counts) if count == 0],
        # Their Hessians have fewer tokens behind them than inputs: damping makes them regular.
        "experts_rank_deficient": [e for e, n in enumerate(counts) if n < job.model.hidden_size],
        "inputs_never_seen": {m: sum(sum(b["unseen"][m]) for b in known) for m in MATRICES},
        "seconds": {part: max(s[part] for s in seconds) for part in seconds[0]},
        "peak_gpu_bytes": max(gpu_bytes),
        "peak_host_bytes": max(host_bytes),
        "ranks": len(of_ranks),
        **asdict(config.rules()),
        "calibration_tokens": sum(s.calibration_tokens for s in job.sequences),
        "replay": _REPLAYS[config.replay],
    }


def _peak_gpu(job: Job) -> int:
    return torch.cuda.max_memory_allocated(job.device) if job.config.device != "cpu" else 0


def _peak_host() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _variants(
    job: Job, errors: Mapping[str, Mapping[str, list[float]]]
) -> dict[str, dict[str, float]]:
    """Return size and mean error of every variant; the experts are alike, so one is measured."""
    num_experts = job.model.n_routed_experts
    num_weights = 3 * job.model.hidden_size * job.model.moe_intermediate_size  # of an expert
    shards = read_index(job.upstream, "mtp.")
    measured = [*job.other_names(), *job.expert_names(range(1))]
    upstream = read_meta(job.upstream, {name: shards[name] for name in measured})
    variants: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        as_stored = "rtn" if variant == "gptq" else variant  # INT4 both
        stored = store_head(upstream, as_stored, group_size=job.config.group_size)
        sizes = {name: num_bytes(tensor) for name, tensor in stored.items()}
        expert = {n: size for n, size in sizes.items() if is_expert(split_name(n)[0])}
        # weight_shape, two int64 a matrix, is bookkeeping and not part of a weight.
        weights = sum(size for name, size in expert.items() if not name.endswith("_shape"))
        all_errors = [error for matrix in MATRICES for error in errors[variant][matrix]]
        variants[variant] = {
            "bits_per_weight": 8 * weights / num_weights,
            "rel_error": sum(all_errors) / len(all_errors),
            "bytes": sum(sizes.values()) + (num_experts - 1) * sum(expert.values()),
        }
    return variants
