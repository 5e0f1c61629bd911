"""Quantize: the head's routed experts to INT4 by GPTQ, calibrated on a capture.

First the head is replayed on every captured sequence, which tells what each routed expert sees.
Then, a batch of experts at a time: their Hessians, GPTQ, and the error of every variant on the
same Hessians. A replayed sequence and an expert batch are the units that a killed run keeps.

Shape legend: E experts of a batch, T tokens, D hidden size, M the experts' intermediate size,
K experts a token.
"""

import json
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.checkpoint import capture as capture_files
from mtp_graft.checkpoint.capture import CapturedSequence, read_recorded, read_sequences
from mtp_graft.checkpoint.manifest import claim_folder, fingerprints, write_manifest
from mtp_graft.checkpoint.shards import (
    INDEX_NAME,
    load_tensors,
    num_bytes,
    open_shard,
    read_index,
    save_shard,
    write_json,
)
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.experts import (
    MATRICES,
    expert_errors,
    expert_hessians,
    quantize_experts,
)
from mtp_graft.dsv4.replay import build_head, replay_routing
from mtp_graft.dsv4.variants import VARIANTS, decode_head, store_head
from mtp_graft.errors import GraftError
from mtp_graft.stages.inputs import (
    REPORT_NAME,
    Progress,
    check_recorded,
    cpu_threads,
    read_base_tensor,
    read_model_config,
)

ZeroTokens = Literal["pool", "rtn", "error"]

REPLAY, GPTQ = "replay", "gptq"


@dataclass(frozen=True)
class QuantizeConfig:
    """How the experts are calibrated; every field decides the result's bytes."""

    damp: float = 0.01
    group_size: int = 128
    #: What calibrates an expert that no token reached: every token ("pool"), nothing, which is
    #: rounding to nearest ("rtn"), or the stage fails ("error").
    zero_tokens: ZeroTokens = "pool"
    experts_per_batch: int = 16
    split: str = "calibration"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the replay
    #: One by default, so that the bytes do not depend on the machine's cores; the products of a
    #: small head gain little from more, and waiting for a core that is busy costs far more.
    cpu_threads: int = 1


@dataclass(frozen=True)
class _Job:
    """The stage's inputs, opened and checked."""

    capture: Path
    upstream: Path
    base: Path
    out: Path
    config: QuantizeConfig
    model: DeepseekV4Config
    head_names: list[str]
    sequences: list[CapturedSequence]
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("replay", "hessian", "gptq", "io"), 0.0)
    )

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time spent inside as `part`'s."""
        started = time.perf_counter()
        yield
        if self.config.device != "cpu":
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - started

    def replay_file(self, sequence: CapturedSequence) -> Path:
        return self.out / REPLAY / f"{sequence.number:06d}.safetensors"

    def batch_file(self, experts: range) -> Path:
        return self.out / GPTQ / f"experts-{experts[0]:04d}-{experts[-1]:04d}.safetensors"

    def batches(self) -> list[range]:
        step = self.config.experts_per_batch
        num_experts: int = self.model.n_routed_experts
        return [range(e, min(e + step, num_experts)) for e in range(0, num_experts, step)]

    def expert_tensors(self, experts: range) -> dict[str, Tensor]:
        """Read the upstream tensors of a batch."""
        prefixes = tuple(f"{names.HEAD_PREFIX}ffn.experts.{e}." for e in experts)
        return load_tensors(self.upstream, [n for n in self.head_names if n.startswith(prefixes)])

    def other_tensors(self) -> dict[str, Tensor]:
        """Read the upstream tensors that are no routed expert's."""
        prefix = f"{names.HEAD_PREFIX}ffn.experts."
        return load_tensors(self.upstream, [n for n in self.head_names if not n.startswith(prefix)])


def quantize(
    capture: Path, upstream: Path, base: Path, out: Path, config: QuantizeConfig, report: Progress
) -> dict[str, Any]:
    """Write GPTQ's experts and the report on all variants to `out`; return the report.

    Goes on where a killed run stopped; the same inputs give the same experts byte for byte.
    Raises GraftError for inputs that do not fit each other, for values that are not finite, for
    a Hessian that damping does not make positive definite, and if `out` is of another
    configuration.
    """
    started = time.perf_counter()
    job = _open(capture, upstream, base, out, config)
    if (out / "manifest.json").exists():
        return json.loads((out / REPORT_NAME).read_text())
    if config.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    other = job.other_tensors()
    with cpu_threads(config.cpu_threads):
        _replay(job, other, report)
        sidecars = _quantize_experts(job, report)
    result = _summary(job, other, sidecars)
    write_json(result, out / REPORT_NAME)
    inputs = [capture / capture_files.INDEX_NAME, upstream / INDEX_NAME, base / INDEX_NAME]
    seconds = time.perf_counter() - started
    write_manifest(out, "quantize", asdict(config), inputs, config.device, seconds)
    return result


def _open(capture: Path, upstream: Path, base: Path, out: Path, config: QuantizeConfig) -> _Job:
    """Check what can be checked before anything is computed, and claim the stage's folder."""
    head_map = read_index(upstream, "mtp.")
    head_names = names.upstream_head_names(head_map, upstream)
    model = read_model_config(base)
    _check_groups(model, config.group_size)
    sequences = [s for s in read_sequences(capture) if s.split == config.split and s.tokens > 1]
    if not sequences:
        raise GraftError(
            f"{capture}: no captured sequences of split {config.split!r}; "
            "run `mtp-graft capture` first"
        )
    shards = sorted({upstream / head_map[name] for name in head_names})
    recordings = {capture / capture_files.RECORDINGS / s.recording for s in sequences}
    inputs = [capture / capture_files.INDEX_NAME, *sorted(recordings), *shards]
    inputs.append(base / read_index(base)["embed.weight"])
    claim_folder(out, {**asdict(config), "inputs": fingerprints([base / "config.json", *inputs])})
    for folder in (REPLAY, GPTQ):
        (out / folder).mkdir(exist_ok=True)
    return _Job(capture, upstream, base, out, config, model, head_names, sequences)


def _check_groups(model: DeepseekV4Config, group_size: int) -> None:
    first = f"{names.HEAD_PREFIX}ffn.experts.0"
    for matrix, inputs in (("w1", model.hidden_size), ("w2", model.moe_intermediate_size)):
        if inputs % group_size:
            raise GraftError(
                f"{first}.{matrix}: has {inputs} inputs, expected a multiple of the group size "
                f"{group_size}; choose a group size that divides it"
            )


# Replay: what the routed experts see


def _replay(job: _Job, other: Mapping[str, Tensor], report: Progress) -> None:
    """Write a file with the experts' inputs and choices for every sequence that has none yet."""
    pending = [s for s in job.sequences if not is_whole(job.replay_file(s))]
    total, done = len(job.sequences), len(job.sequences) - len(pending)
    report("replay", done, total)
    if not pending:
        return
    config = job.config
    with job.timed("io"):
        embed = read_base_tensor(job.base, "embed.weight", job.model)
        dtype: torch.dtype = getattr(torch, config.dtype)
        head = build_head(
            job.model, decode_head(other), with_experts=False, device=config.device, dtype=dtype
        )
    for sequence in pending:
        with job.timed("io"):
            recorded = read_recorded(job.capture, sequence, job.model.hc_mult)
            check_recorded(job.capture, sequence, recorded, job.model)
        with job.timed("replay"):
            routed = replay_routing(head, recorded.residual, embed[recorded.token_ids])
        with job.timed("io"):
            # BF16 is the precision that the experts' inputs have in service.
            x, experts = routed.x.to(torch.bfloat16).cpu(), routed.experts.int().cpu()
            save_shard({"x": x, "experts": experts}, job.replay_file(sequence))
        done += 1
        report("replay", done, total)


def is_whole(path: Path) -> bool:
    """Say whether a unit's file is there and readable; one that is not, is made again."""
    try:
        with open_shard(path):
            return True
    except GraftError:
        return False


# Hessians, GPTQ and errors, a batch of experts at a time


def _quantize_experts(job: _Job, report: Progress) -> list[dict[str, Any]]:
    """Quantize the batches that are still to do; return what is known of each batch."""
    total = job.model.n_routed_experts
    sidecars: list[dict[str, Any]] = []
    report("gptq", 0, total)
    for experts in job.batches():
        sidecar = job.batch_file(experts).with_suffix(".json")
        # The experts are written last: where they are, the batch is complete.
        if not (is_whole(job.batch_file(experts)) and sidecar.exists()):
            stored, known = _quantize_batch(job, experts)
            with job.timed("io"):
                write_json(known, sidecar)
                save_shard(stored, job.batch_file(experts))
        sidecars.append(json.loads(sidecar.read_text()))
        report("gptq", experts[-1] + 1, total)
    return sidecars


def _quantize_batch(job: _Job, experts: range) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the batch's stored experts, and its token counts, sizes and relative errors."""
    config = job.config
    with job.timed("io"):
        upstream = job.expert_tensors(experts)
        weights = _stacked(decode_head(upstream), experts, job)
        rows = _gather(job, experts)
    counts = [len(x) for x in rows]
    with job.timed("hessian"):
        if 0 in counts:
            substitute = _without_tokens(job, experts[counts.index(0)])
            rows = [x if len(x) else substitute for x in rows]
        hessians = expert_hessians(rows, weights, job.model.swiglu_limit)
    with job.timed("gptq"):
        stored = quantize_experts(weights, hessians, experts, config.damp, config.group_size)
        measured = {
            variant: store_head(upstream, variant, stored, group_size=config.group_size)
            for variant in VARIANTS
        }
        errors = {
            variant: expert_errors(
                decode_head(head, group_size=config.group_size), weights, hessians, experts
            )
            for variant, head in measured.items()
        }
    sizes = {variant: sum(map(num_bytes, head.values())) for variant, head in measured.items()}
    return stored, {"counts": counts, "bytes": sizes, "rel_errors": errors}


def _stacked(decoded: Mapping[str, Tensor], experts: range, job: _Job) -> dict[str, Tensor]:
    """Return w1 and w3 [E, M, D] and w2 [E, D, M] in float32 on the stage's device."""
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
        stacked[matrix] = torch.stack(found).to(job.config.device)
    return stacked


def _gather(job: _Job, experts: range) -> list[Tensor]:
    """Return the inputs [T, D] that reached each expert, in the order of the sequences."""
    rows: list[list[Tensor]] = [[] for _ in experts]
    for sequence in job.sequences:
        with open_shard(job.replay_file(sequence)) as file:
            x, chosen = file.get_tensor("x"), file.get_tensor("experts")  # [T, D], [T, K]
        for expert_rows, e in zip(rows, experts, strict=True):
            expert_rows.append(x[(chosen == e).any(dim=-1)])
    return [torch.cat(parts) for parts in rows]


def _without_tokens(job: _Job, expert: int) -> Tensor:
    """Return the rows [T, D] that calibrate experts no token reached, as `zero_tokens` says."""
    match job.config.zero_tokens:
        case "pool":
            return torch.cat([_all_rows(job.replay_file(s)) for s in job.sequences])
        case "rtn":
            return torch.empty(0, job.model.hidden_size)
        case "error":
            raise GraftError(
                f"{names.HEAD_PREFIX}ffn.experts.{expert}: no token of {job.capture} reached it, "
                "and zero_tokens is 'error'; capture more prompts, or choose 'pool' or 'rtn'"
            )


def _all_rows(path: Path) -> Tensor:
    with open_shard(path) as file:
        return file.get_tensor("x")


# The report


def _summary(
    job: _Job, other: Mapping[str, Tensor], sidecars: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the stage's result, from what is known of every batch."""
    counts: list[int] = [count for sidecar in sidecars for count in sidecar["counts"]]
    errors: dict[str, dict[str, list[float]]] = {
        variant: {
            matrix: [e for sidecar in sidecars for e in sidecar["rel_errors"][variant][matrix]]
            for matrix in MATRICES
        }
        for variant in VARIANTS
    }
    config = job.config
    on_gpu = config.device != "cpu"
    return {
        "variants": _variants(job, other, sidecars, errors),
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
        "seconds": dict(job.seconds),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "peak_host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "damp": config.damp,
        "group_size": config.group_size,
        "calibration_tokens": sum(sequence.tokens - 1 for sequence in job.sequences),
        "replay": "true attention",
    }


def _variants(
    job: _Job,
    other: Mapping[str, Tensor],
    sidecars: list[dict[str, Any]],
    errors: Mapping[str, Mapping[str, list[float]]],
) -> dict[str, dict[str, float]]:
    """Return size and mean error of every variant."""
    num_experts, hidden = job.model.n_routed_experts, job.model.hidden_size
    num_weights = 3 * num_experts * hidden * job.model.moe_intermediate_size
    not_experts = sum(num_bytes(t) for t in store_head(other, "bf16").values())
    variants: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        size = sum(sidecar["bytes"][variant] for sidecar in sidecars)
        # weight_shape, two int64 a matrix, is bookkeeping and not part of a weight.
        shapes = 3 * num_experts * 16 if variant in ("rtn", "gptq") else 0
        all_errors = [error for matrix in MATRICES for error in errors[variant][matrix]]
        variants[variant] = {
            "bits_per_weight": 8 * (size - shapes) / num_weights,
            "rel_error": sum(all_errors) / len(all_errors),
            "bytes": size + not_experts,
        }
    return variants
