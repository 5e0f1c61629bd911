"""Quantize: the head's routed experts to INT4 by GPTQ, calibrated on a capture.

The data's way, from top to bottom:

    capture       every sequence's tokens and residual stream, as the base computed them
    replay        the head on them, without its experts: which tokens reach which
    Hessians      of each expert matrix's inputs; w2 has its own
    GPTQ          codes and scales under these Hessians, and every variant's error (`dsv4.experts`)
    files         gptq/experts-*.safetensors, report.json

A batch of experts is the unit that a killed run keeps. Files are read ahead and written behind the
computation.

Shapes: T tokens of a sequence, N of all sequences, S hyper-connection streams, D hidden size,
V vocabulary, K experts a token, E experts of a batch, M the experts' intermediate size.
"""

import json
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_graft.checkpoint import manifest
from mtp_graft.checkpoint.capture import CapturedSequence, Recorded
from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.shards import Shard, load_tensors, save_shard
from mtp_graft.dsv4 import experts as head_experts
from mtp_graft.dsv4.dspark import DSpark
from mtp_graft.dsv4.experts import MATRICES, RoutedTokens
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.names import head_from_module
from mtp_graft.dsv4.replay import build_dspark, build_head, replay_block_routing, replay_routing
from mtp_graft.dsv4.variants import decode_head, store_head
from mtp_graft.errors import GraftError
from mtp_graft.recipe import ALL_VARIANTS, QuantizeSection, Variant
from mtp_graft.stages import parallel
from mtp_graft.stages.inputs import CALIBRATION, GPTQ, REPORT_NAME, Inputs, Progress, open_inputs
from mtp_graft.stages.parallel import Clock

#: Sequences, and batches of upstream's experts, that are read ahead.
_SEQUENCES_AHEAD, _BATCHES_AHEAD = 8, 2
#: Batches that are written at once: while one is synced, another can be copied.
_WRITERS = 2
#: Tokens of up to this size stay on a GPU: 786,000 of Flash, beside which 24 GiB have room.
RESIDENT_BYTES = 6 * 2**30


def quantize(
    capture: Path,
    upstream: Path,
    base: Path,
    out: Path,
    settings: QuantizeSection,
    report: Progress,
) -> dict[str, Any]:
    """Write GPTQ's experts and the report on all variants to `out`; return the report.

    Goes on where a killed run stopped; the same inputs give the same experts byte for byte. Raises
    GraftError for inputs that do not fit each other, for values that are not finite, for a Hessian
    that damping does not make positive definite, and if `out` is of another configuration.
    """
    started = time.perf_counter()
    with parallel.single_thread():
        inputs = _open(capture, upstream, base, settings)
        clock = Clock(parallel.find_device(settings.device))
        _claim(out, inputs, settings, clock.device)
        if (finished := manifest.finished_result(out, REPORT_NAME)) is not None:
            return finished
        batches = _batches(inputs, settings.experts_per_batch, out / GPTQ)
        for stage in range(inputs.stages or 1):
            if any(batch.stage == stage and not _is_done(batch.file) for batch in batches):
                _quantize(inputs, settings, batches, stage, clock, report)
        result = _report(inputs, settings, [batch.file for batch in batches], clock)
        seconds = result["seconds"]["total"] = time.perf_counter() - started
        write_json(result, out / REPORT_NAME)
        given = inputs.indexes()
        manifest.write_manifest(out, "quantize", asdict(settings), given, clock.device, seconds)
        return result


class _Batch(NamedTuple):
    """Some experts of one stage; a head has stage 0 alone."""

    stage: int
    experts: range
    file: Path

    @property
    def modules(self) -> list[str]:
        return [f"mtp.{self.stage}.ffn.experts.{e}" for e in self.experts]


def _batches(inputs: Inputs, size: int, out: Path) -> list[_Batch]:
    total, found = inputs.model.n_routed_experts, list[_Batch]()
    for stage in range(inputs.stages or 1):
        of_stage = f"{stage}-" if inputs.stages else ""
        for e in range(0, total, size):
            end = min(e + size, total)
            file = out / f"experts-{of_stage}{e:04d}-{end - 1:04d}.safetensors"
            found.append(_Batch(stage, range(e, end), file))
    return found


def _open(capture: Path, upstream: Path, base: Path, settings: QuantizeSection) -> Inputs:
    """Check what can be checked before anything is computed."""
    inputs = open_inputs(capture, upstream, base, CALIBRATION, "embed.weight")
    with inputs.head.named():
        store_head(inputs.head.meta, "rtn", group_size=settings.group_size)  # or it does not divide
    sequences = [s for s in inputs.sequences if inputs.calibration_rows(s)]
    if not sequences:
        raise GraftError(
            f"{capture}: no captured sequences of split {CALIBRATION!r} with three tokens or more; "
            "run `mtp-graft capture` first"
        )
    return replace(inputs, sequences=sequences)


def _claim(out: Path, inputs: Inputs, settings: QuantizeSection, device: str) -> None:
    """Make `out` this stage's folder; GraftError if it was begun with other settings or inputs."""
    decisive = asdict(settings) | {"device": device}
    del decisive["variants"]  # which heads there are is for the later stages to know
    decisive["inputs"] = manifest.fingerprints(inputs.files)
    manifest.claim_folder(out, decisive)
    (out / GPTQ).mkdir(exist_ok=True)


def _is_done(file: Path) -> bool:
    """Return whether a batch is there and readable; one that is not, is made again."""
    try:
        with Shard(file):
            return file.with_suffix(".json").exists()
    except GraftError:
        return False


# Replay


def replay_capture(
    inputs: Inputs, clock: Clock, report: Progress, stage: int = 0, quantized: Sequence[Path] = ()
) -> RoutedTokens:
    """Run the drafter, without the experts of `stage`, on the capture; return what reaches them.

    `quantized` are the files of the experts before. The tokens are in BF16, the precision that the
    experts' inputs have in service; on the clock's device, or in host memory if they are many.
    """
    model, sequences = inputs.model, inputs.sequences
    num_tokens = sum(map(inputs.calibration_rows, sequences))
    fits = 2 * num_tokens * model.hidden_size <= RESIDENT_BYTES
    device = clock.device if fits else "cpu"
    x = torch.empty(num_tokens, model.hidden_size, dtype=torch.bfloat16, device=device)  # [N, D]
    shape = (num_tokens, model.num_experts_per_tok)
    experts = torch.empty(shape, dtype=torch.int32, device=device)  # [N, K]
    weights = torch.empty(shape if inputs.stages else (0,), device=device)
    start, read = 0, partial(inputs.read_sequence, device=clock.device)
    report("replay", 0, len(sequences))
    with parallel.read_ahead(read, sequences, _SEQUENCES_AHEAD) as captured:
        with clock.timed("io"):  # while the first sequences are being read
            embed = load_tensors(inputs.base, ["embed.weight"])["embed.weight"].to(clock.device)
            drafter = _load_drafter(inputs, clock.device, stage, quantized)
        for number, sequence in enumerate(sequences, start=1):
            with clock.timed("io"):
                recorded = next(captured)
            end = start + inputs.calibration_rows(sequence)
            with clock.timed("replay", tf32=True):
                routed = _route(drafter, inputs, sequence, recorded, embed)
                x[start:end], experts[start:end], shares = routed
                if inputs.stages:
                    weights[start:end] = shares
            start = end
            report("replay", number, len(sequences))
    return RoutedTokens(x, experts, model.n_routed_experts, weights if inputs.stages else None)


def _route(
    drafter: MTPHead | DSpark,
    inputs: Inputs,
    sequence: CapturedSequence,
    recorded: Recorded,
    embed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the experts are given of one sequence, as a `RoutingRecorder` keeps it."""
    if isinstance(drafter, DSpark):
        assert recorded.taps is not None
        given = recorded.taps, recorded.token_ids, embed
        return replay_block_routing(drafter, *given, sequence.prompt_tokens, inputs.block_size)
    known = sequence.calibration_tokens + 1  # at token i the head reads token i + 1
    embeds = embed[recorded.token_ids[:known].to(embed.device)]  # [T + 1, D]
    return replay_routing(drafter, recorded.residual[:known], embeds)


def _load_drafter(
    inputs: Inputs, device: str, stage: int, quantized: Sequence[Path]
) -> MTPHead | DSpark:
    """Return the drafter up to a stage, which has no experts; those before are quantized."""
    others = [name for name in inputs.head.files if ".ffn.experts." not in name]
    decoded = decode_head(inputs.read_upstream(others, device))
    if not inputs.stages:
        return build_head(inputs.model, decoded, with_experts=False, device=device)
    made = inputs.model, decoded, inputs.stages
    drafter = build_dspark(*made, recorded=stage, device=device)
    views = head_from_module(drafter.state_dict(), inputs.stages)
    for file in quantized:
        with Shard(file) as shard:
            for name, tensor in decode_head(shard.read([*shard.meta])).items():
                views[name].copy_(tensor)
    return drafter


# Hessians, GPTQ, errors: a batch of experts at a time


def _quantize(
    inputs: Inputs,
    settings: QuantizeSection,
    batches: Sequence[_Batch],
    stage: int,
    clock: Clock,
    report: Progress,
) -> None:
    """Replay the capture, then quantize every pending batch of a stage and write its file."""

    def read(batch: _Batch) -> dict[str, Tensor]:
        prefixes = tuple(f"{module}." for module in batch.modules)
        names = [name for name in inputs.head.files if name.startswith(prefixes)]
        return inputs.read_upstream(names, clock.device)

    total = sum(len(batch.experts) for batch in batches)
    pending = [b for b in batches if b.stage >= stage and not _is_done(b.file)]
    done = total - sum(len(batch.experts) for batch in pending)
    pending = [batch for batch in pending if batch.stage == stage]
    # The first experts come in while the sequences are replayed.
    with (
        parallel.read_ahead(read, pending, _BATCHES_AHEAD) as upstream,
        parallel.write_behind(_WRITERS) as write,
    ):
        before = [batch.file for batch in batches if batch.stage < stage]
        routed = replay_capture(inputs, clock, report, stage, before)
        report("gptq", done, total)
        for batch in pending:
            with clock.timed("io"):
                tensors = next(upstream)
            packed, known = _quantize_batch(inputs, settings, routed, tensors, batch, clock)
            with clock.timed("io"):
                write(_save_batch, packed, known, batch.file)
            done += len(batch.experts)
            report("gptq", done, total)


def _quantize_batch(
    inputs: Inputs,
    settings: QuantizeSection,
    routed: RoutedTokens,
    upstream: Mapping[str, Tensor],
    batch: _Batch,
    clock: Clock,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the batch's packed experts, and its token counts and relative errors."""
    with inputs.head.named(), clock.timed("hessian", tf32=True):
        decoded, modules, experts = decode_head(upstream), batch.modules, batch.experts
        weights = {  # f32, w1 and w3 [E, M, D] and w2 [E, D, M]
            matrix: torch.stack([decoded[f"{e}.{matrix}.weight"] for e in modules])
            for matrix in MATRICES
        }
        tokens = [routed.of_expert(e) for e in experts]
        hessians = head_experts.expert_hessians(
            tokens, weights, inputs.model.swiglu_limit
        )  # of w1, w2, w3
    with clock.timed("gptq"):
        num_tokens = [routed.counts[e] or len(routed.x) for e in experts]
        quantized = head_experts.quantize_experts(weights, hessians, num_tokens, modules, settings)
    with clock.timed("pack"):
        packed = head_experts.pack_experts(quantized, modules)
    with clock.timed("errors", tf32=True):
        errors = head_experts.expert_errors(weights, hessians, quantized, settings.group_size)
    return packed, {"counts": [routed.counts[e] for e in experts], "rel_errors": errors}


def _save_batch(packed: Mapping[str, Tensor], known: Mapping[str, Any], path: Path) -> None:
    write_json(known, path.with_suffix(".json"))
    # Pinned memory is reused by torch, and a GPU writes to it by itself.
    on_host = {
        name: torch.empty_like(t, device="cpu", pin_memory=True).copy_(t) if t.is_cuda else t
        for name, t in packed.items()
    }
    save_shard(on_host, path)  # last: where the experts are, the batch is complete


# The report


def _report(
    inputs: Inputs, settings: QuantizeSection, files: list[Path], clock: Clock
) -> dict[str, Any]:
    """Return the stage's result, from what is known of every batch."""
    known = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    counts: list[int] = [count for batch in known for count in batch["counts"]]
    errors: dict[Variant, dict[str, list[float]]] = {
        v: {m: [e for batch in known for e in batch["rel_errors"][v][m]] for m in MATRICES}
        for v in ALL_VARIANTS
    }
    return {
        "variants": {v: _summary(inputs, v, errors[v], settings.group_size) for v in errors},
        "tokens_per_expert": {
            "min": min(counts),
            "mean": sum(counts) / len(counts),
            "max": max(counts),
            "zero": counts.count(0),
            "counts": counts,
        },
        "rel_errors": errors,
        "experts_without_tokens": [e for e, count in enumerate(counts) if count == 0],
        "seconds": clock.seconds,
        "peak_gpu_bytes": clock.peak_gpu_bytes(),
        "peak_host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        **{k: getattr(settings, k) for k in ("damp", "damping", "group_size", "scale")},
        "calibration_tokens": sum(map(inputs.calibration_rows, inputs.sequences)),
    }


def _summary(
    inputs: Inputs, variant: Variant, errors: Mapping[str, list[float]], group_size: int
) -> dict[str, float]:
    """Return size and mean error of a variant."""
    as_stored: Variant = "rtn" if variant == "gptq" else variant  # INT4 both
    stored = store_head(inputs.head.meta, as_stored, group_size=group_size)
    # weight_shape, two int64 a matrix, is bookkeeping and not part of a weight.
    codes = sum(
        tensor.nbytes
        for name, tensor in stored.items()
        if ".ffn.experts." in name and not name.endswith("_shape")
    )
    model = inputs.model
    num_experts = model.n_routed_experts * (inputs.stages or 1)
    weights = 3 * num_experts * model.hidden_size * model.moe_intermediate_size
    all_errors = [error for matrix in MATRICES for error in errors[matrix]]
    return {
        "bits_per_weight": 8 * codes / weights,
        "rel_error": sum(all_errors) / len(all_errors),
        "bytes": sum(tensor.nbytes for tensor in stored.values()),
    }
