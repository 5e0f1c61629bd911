"""Quantize: the head's routed experts to INT4 by GPTQ, calibrated on a capture.

The data's way, from top to bottom:

    capture       every sequence's tokens and residual stream, as the base computed them
    replay        the head on them, without its experts: which tokens reach which (`stages.replay`)
    Hessians      of each expert matrix's inputs; w2 has its own (`dsv4.hessians`)
    GPTQ          codes and scales under these Hessians, and every variant's error (`dsv4.experts`)
    files         replay/*.safetensors, gptq/experts-*.safetensors, report.json

A replayed sequence and a batch of experts are the units that a killed run keeps, and that the
ranks of torchrun share. Files are read ahead and written behind the computation.

Shapes: T tokens that reach an expert, E experts of a batch, D hidden size, M the experts'
intermediate size, I inputs of a matrix.
"""

import json
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.manifest import (
    claim_folder,
    fingerprints,
    finished_result,
    write_manifest,
)
from mtp_graft.checkpoint.shards import read_meta, save_shard
from mtp_graft.dsv4.experts import (
    MATRICES,
    expert_errors,
    expert_name,
    pack_experts,
    quantize_experts,
)
from mtp_graft.dsv4.hessians import RoutedTokens, expert_hessians
from mtp_graft.dsv4.names import EXPERTS_PREFIX
from mtp_graft.dsv4.variants import VARIANTS, decode_head, store_head
from mtp_graft.errors import GraftError
from mtp_graft.recipe import QuantizeSection
from mtp_graft.stages.inputs import (
    CALIBRATION,
    REPORT_NAME,
    Inputs,
    Progress,
    open_inputs,
    single_thread,
)
from mtp_graft.stages.parallel import (
    Clock,
    gather,
    is_first_rank,
    joined_ranks,
    rank_device,
    read_ahead,
    share,
    wait_for_ranks,
    write_behind,
)
from mtp_graft.stages.replay import is_whole, replay_capture, to_host

REPLAY, GPTQ = "replay", "gptq"
#: Batches of upstream's experts that are read ahead, and written at once: while one is synced,
#: another can be copied.
_BATCHES_AHEAD, _WRITERS = 2, 2
#: What of the settings the report and the checkpoint's manifest have.
_GPTQ_SETTINGS = ("damp", "damping", "group_size", "scale")
#: What the report says of each way to replay.
_REPLAYS = {"true": "true attention", "identity": "attention skipped (identity residual)"}


def quantize(
    capture: Path,
    upstream: Path,
    base: Path,
    out: Path,
    settings: QuantizeSection,
    report: Progress,
) -> dict[str, Any]:
    """Write GPTQ's experts and the report on all variants to `out`; return the report.

    Goes on where a killed run stopped; the same inputs give the same experts byte for byte, on
    one rank or several (torchrun). Raises GraftError for inputs that do not fit each other, for
    values that are not finite, for a Hessian that damping does not make positive definite, and
    if `out` is of another configuration.
    """
    started = time.perf_counter()
    with joined_ranks(), single_thread():
        inputs = _open(capture, upstream, base, settings)
        clock = Clock(rank_device(settings.device))
        if is_first_rank():
            _claim(out, inputs, settings, clock.device)
        wait_for_ranks()
        if (finished := finished_result(out, REPORT_NAME)) is not None:
            return finished
        files = _batch_files(out, inputs.model.n_routed_experts, settings.experts_per_batch)
        pending = {e: files[e] for e in share([*files]) if not _is_done(files[e])}
        # The first experts come in while the last sequences are replayed.
        read = partial(_read_experts, inputs, clock.device)
        with read_ahead(read, pending, _BATCHES_AHEAD) as upstream_experts:
            routed = replay_capture(inputs, out / REPLAY, settings.replay, clock, report)
            _quantize(inputs, settings, routed, upstream_experts, pending, clock, report)
        measured = gather((clock.seconds, clock.peak_gpu_bytes(), _peak_host_bytes()))
        result = _report(inputs, settings, [*files.values()], measured)
        total = result["seconds"]["total"] = time.perf_counter() - started
        if is_first_rank():
            write_json(result, out / REPORT_NAME)
            given = inputs.indexes()
            write_manifest(out, "quantize", asdict(settings), given, clock.device, total)
        wait_for_ranks()
        return result


def _open(capture: Path, upstream: Path, base: Path, settings: QuantizeSection) -> Inputs:
    """Check what can be checked before anything is computed."""
    inputs = open_inputs(capture, upstream, base, CALIBRATION)
    widths = {"w1": inputs.model.hidden_size, "w2": inputs.model.moe_intermediate_size}
    for matrix, num_inputs in widths.items():
        if num_inputs % settings.group_size:
            raise GraftError(
                f"{expert_name(0, matrix)}: has {num_inputs} inputs, expected a multiple of the "
                f"group size {settings.group_size}; choose a group size that divides it"
            )
    sequences = [s for s in inputs.sequences if s.calibration_tokens]
    if not sequences:
        raise GraftError(
            f"{capture}: no captured sequences of split {CALIBRATION!r} with three tokens or more; "
            "run `mtp-graft capture` first"
        )
    return replace(inputs, sequences=sequences)


def _claim(out: Path, inputs: Inputs, settings: QuantizeSection, device: str) -> None:
    """Make `out` this stage's folder; GraftError if it was begun with other settings or inputs."""
    decisive = asdict(settings) | {"device": device.partition(":")[0]}
    del decisive["variants"]  # which heads there are is for the later stages to know
    decisive["inputs"] = fingerprints(inputs.files("embed.weight"))
    claim_folder(out, decisive)
    for folder in (REPLAY, GPTQ):
        (out / folder).mkdir(exist_ok=True)


def _batch_files(out: Path, num_experts: int, size: int) -> dict[range, Path]:
    """Return where each batch of experts is kept."""
    batches = [range(e, min(e + size, num_experts)) for e in range(0, num_experts, size)]
    return {e: out / GPTQ / f"experts-{e[0]:04d}-{e[-1]:04d}.safetensors" for e in batches}


def _is_done(file: Path) -> bool:
    return is_whole(file) and file.with_suffix(".json").exists()


def _read_experts(inputs: Inputs, device: str, experts: range) -> dict[str, Tensor]:
    return inputs.read_upstream(_expert_names(inputs, experts), device)


def _expert_names(inputs: Inputs, experts: range) -> list[str]:
    """Return the names of some experts' upstream tensors."""
    prefixes = tuple(f"{EXPERTS_PREFIX}{e}." for e in experts)
    return [name for name in inputs.shards if name.startswith(prefixes)]


# Hessians, GPTQ, errors: a batch of experts at a time


def _quantize(
    inputs: Inputs,
    settings: QuantizeSection,
    routed: RoutedTokens,
    upstream: Iterator[Mapping[str, Tensor]],
    pending: Mapping[range, Path],
    clock: Clock,
    report: Progress,
) -> None:
    """Write the file of every pending batch, whose tensors `upstream` gives."""
    total = inputs.model.n_routed_experts
    done = total - sum(map(len, pending))
    report("gptq", done, total)
    with write_behind(_WRITERS) as write:
        for experts, file in pending.items():
            with clock.timed("io"):
                tensors = next(upstream)
            packed, known = _quantize_batch(inputs, settings, routed, tensors, experts, clock)
            with clock.timed("io"):
                write(_save_batch, packed, known, file)
            done += len(experts)
            report("gptq", done, total)


def _quantize_batch(
    inputs: Inputs,
    settings: QuantizeSection,
    routed: RoutedTokens,
    upstream: Mapping[str, Tensor],
    experts: range,
    clock: Clock,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the batch's packed experts, and its token counts and relative errors."""
    with clock.timed("hessian", tf32=True):
        weights = _stacked(inputs, decode_head(upstream), experts)
        calibrating = [_calibrating(inputs, settings, routed, e) for e in experts]
        tokens, num_tokens = zip(*calibrating, strict=True)
        hessians = expert_hessians(tokens, weights, inputs.model.swiglu_limit)
    with clock.timed("gptq"):
        quantized = quantize_experts(weights, hessians, num_tokens, experts, settings)
    with clock.timed("pack"):
        packed = pack_experts(quantized, experts)
    with clock.timed("errors", tf32=True):
        errors = expert_errors(weights, hessians, quantized, settings.group_size)
    unseen = {m: (hessians[m].diagonal(dim1=1, dim2=2) == 0).sum(1).tolist() for m in MATRICES}
    counts = [routed.counts[e] for e in experts]
    return packed, {"counts": counts, "rel_errors": errors, "unseen": unseen}


def _stacked(inputs: Inputs, decoded: Mapping[str, Tensor], experts: range) -> dict[str, Tensor]:
    """Return w1 and w3 [E, M, D] and w2 [E, D, M] in float32."""
    hidden, inner = inputs.model.hidden_size, inputs.model.moe_intermediate_size
    stacked = {}
    for matrix in MATRICES:
        names = [f"{expert_name(e, matrix)}.weight" for e in experts]
        expected = [hidden, inner] if matrix == "w2" else [inner, hidden]
        for name in names:
            shape = list(decoded[name].shape) if name in decoded else "missing"
            if shape != expected:
                raise GraftError(
                    f"{name}: is {shape}, expected {expected} by the base's config.json; "
                    f"{inputs.upstream} and {inputs.base} are of different models"
                )
        stacked[matrix] = torch.stack([decoded[name] for name in names])
    return stacked


def _calibrating(
    inputs: Inputs, settings: QuantizeSection, routed: RoutedTokens, expert: int
) -> tuple[Iterable[Tensor], int]:
    """Return what an expert is calibrated on, in parts [T, D], and how many tokens that is."""
    if count := routed.counts[expert]:
        return routed.of_expert(expert), count
    match settings.zero_tokens:
        case "pool":
            return routed.of_all(), len(routed.x)
        case "rtn":
            return (), 0
        case "error":
            raise GraftError(
                f"{EXPERTS_PREFIX}{expert}: no token of {inputs.capture} reached it, and "
                "zero_tokens is 'error'; capture more prompts, or choose 'pool' or 'rtn'"
            )


def _save_batch(packed: Mapping[str, Tensor], known: Mapping[str, Any], path: Path) -> None:
    write_json(known, path.with_suffix(".json"))
    # The experts are written last: where they are, the batch is complete.
    save_shard(to_host(packed), path)


# The report


def _peak_host_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _report(
    inputs: Inputs,
    settings: QuantizeSection,
    files: list[Path],
    measured: list[tuple[dict[str, float], int, int]],
) -> dict[str, Any]:
    """Return the stage's result, from what is known of every batch and `measured` of every rank."""
    known = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    counts: list[int] = [count for batch in known for count in batch["counts"]]
    errors: dict[str, dict[str, list[float]]] = {
        v: {m: [e for batch in known for e in batch["rel_errors"][v][m]] for m in MATRICES}
        for v in VARIANTS
    }
    seconds, gpu_bytes, host_bytes = zip(*measured, strict=True)
    return {
        "variants": _variants(inputs, errors, settings.group_size),
        "tokens_per_expert": {
            "min": min(counts),
            "mean": sum(counts) / len(counts),
            "max": max(counts),
            "zero": counts.count(0),
            "counts": counts,
        },
        "rel_errors": errors,
        "zero_token_policy": settings.zero_tokens,
        "experts_without_tokens": [e for e, count in enumerate(counts) if count == 0],
        # Their Hessians have fewer tokens behind them than inputs: damping makes them regular.
        "experts_rank_deficient": [e for e, n in enumerate(counts) if n < inputs.model.hidden_size],
        "inputs_never_seen": {m: sum(sum(b["unseen"][m]) for b in known) for m in MATRICES},
        "seconds": {part: max(s[part] for s in seconds) for part in seconds[0]},
        "peak_gpu_bytes": max(gpu_bytes),
        "peak_host_bytes": max(host_bytes),
        "ranks": len(measured),
        **{key: getattr(settings, key) for key in _GPTQ_SETTINGS},
        "calibration_tokens": sum(s.calibration_tokens for s in inputs.sequences),
        "replay": _REPLAYS[settings.replay],
    }


def _variants(
    inputs: Inputs, errors: Mapping[str, Mapping[str, list[float]]], group_size: int
) -> dict[str, dict[str, float]]:
    """Return size and mean error of every variant; the experts are alike, so one is measured."""
    model = inputs.model
    num_weights = 3 * model.hidden_size * model.moe_intermediate_size  # of an expert
    first = _expert_names(inputs, range(1))
    measured = [n for n in inputs.shards if n in first or not n.startswith(EXPERTS_PREFIX)]
    meta = read_meta(inputs.upstream, "mtp.")
    upstream = {name: meta[name] for name in measured}
    variants: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        as_stored = "rtn" if variant == "gptq" else variant  # INT4 both
        stored = store_head(upstream, as_stored, group_size=group_size)
        sizes = {name: tensor.nbytes for name, tensor in stored.items()}
        expert = {n: size for n, size in sizes.items() if n.startswith(EXPERTS_PREFIX)}
        # weight_shape, two int64 a matrix, is bookkeeping and not part of a weight.
        weights = sum(size for name, size in expert.items() if not name.endswith("_shape"))
        all_errors = [error for matrix in MATRICES for error in errors[variant][matrix]]
        variants[variant] = {
            "bits_per_weight": 8 * weights / num_weights,
            "rel_error": sum(all_errors) / len(all_errors),
            "bytes": sum(sizes.values()) + (model.n_routed_experts - 1) * sum(expert.values()),
        }
    return variants
