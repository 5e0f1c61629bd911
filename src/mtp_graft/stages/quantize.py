"""Quantize: the head's routed experts to INT4 by GPTQ, calibrated on a capture.

    capture       every sequence's tokens and residual stream, as the base computed them
    replay        the head on them, without its experts: which tokens reach which
    Hessians      of each expert matrix's inputs; w2 has its own
    GPTQ          codes and scales under these Hessians, and every variant's error (`dsv4.experts`)
    files         gptq/experts-*.safetensors, report.json

A batch of experts is what a killed run keeps. Files are read ahead and written behind.

Shapes: T tokens of a sequence, N of all sequences, S hyper-connection streams, D hidden size,
V vocabulary, K experts a token, E experts of a batch, M the experts' intermediate size.
"""

import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_graft.checkpoint.capture import CapturedSequence, Recorded
from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.shards import Shard, load_tensors, save_shard
from mtp_graft.dsv4 import experts as head_experts
from mtp_graft.dsv4.experts import MATRICES, RoutedTokens
from mtp_graft.dsv4.names import head_from_module
from mtp_graft.dsv4.replay import build_dspark, build_head, replay_block_routing, replay_routing
from mtp_graft.dsv4.variants import Decoded, decode_head, store_head
from mtp_graft.errors import GraftError
from mtp_graft.recipe import ALL_VARIANTS, QuantizeSection, Variant
from mtp_graft.stages import parallel
from mtp_graft.stages.inputs import CALIBRATION, GPTQ, Inputs, Progress, open_inputs
from mtp_graft.stages.parallel import Clock

#: Sequences, and batches of upstream's experts, that are read ahead.
_SEQUENCES_AHEAD, _BATCHES_AHEAD = 8, 2
#: Tokens of up to this size stay on a GPU: 786,000 of Flash, beside which 24 GiB have room.
RESIDENT_BYTES = 6 * 2**30


def quantize(
    capture: Path, upstream: Path, base: Path, out: Path, section: QuantizeSection, report: Progress
) -> dict[str, Any]:
    """Write GPTQ's experts and the report on all variants to `out`; return the report.

    Goes on where a killed run stopped; the same inputs give the same experts byte for byte. Raises
    GraftError for inputs that do not fit each other, for values that are not finite, for a Hessian
    that damping does not make positive definite, and if `out` is of another configuration.
    """
    started = time.perf_counter()
    with parallel.single_thread():
        inputs = open_inputs(capture, upstream, base, CALIBRATION, "embed.weight")
        with inputs.head.named():  # whose experts' inputs the group size may not divide
            store_head(inputs.head.meta, "rtn", group_size=section.group_size)
        if not (sequences := [s for s in inputs.sequences if inputs.calibration_rows(s)]):
            found = f"no captured sequences of split {CALIBRATION!r} with three tokens or more"
            raise GraftError(f"{capture}: {found}; run `mtp-graft capture` first")
        inputs = replace(inputs, sequences=sequences)
        clock = Clock(parallel.find_device(section.device))
        config = asdict(section) | {"device": clock.device}
        # Which heads there are is for the later stages to know.
        if finished := inputs.claim(out, {k: v for k, v in config.items() if k != "variants"}):
            return finished
        (out / GPTQ).mkdir(exist_ok=True)
        work = _Work(inputs, section, clock, report)
        batches = _batches(inputs, section.experts_per_batch, out / GPTQ)
        pending = [batch for batch in batches if not batch.is_done()]
        for _, of_stage in groupby(pending, lambda batch: batch.stage):
            _quantize(work, batches, [*of_stage])
        result = _report(work, batches)
        seconds = result["seconds"]["total"] = time.perf_counter() - started
        inputs.finish(out, "quantize", config, result, seconds)
        return result


class _Work(NamedTuple):
    inputs: Inputs
    settings: QuantizeSection
    clock: Clock
    report: Progress


class _Batch(NamedTuple):
    """Some experts of one stage; a head has stage 0 alone."""

    stage: int
    experts: range
    file: Path

    @property
    def modules(self) -> list[str]:
        return [f"mtp.{self.stage}.ffn.experts.{e}" for e in self.experts]

    def is_done(self) -> bool:
        """Return whether the file is there and readable; one that is not, is made again."""
        with suppress(GraftError), Shard(self.file):
            return self.file.with_suffix(".json").exists()
        return False


def _batches(inputs: Inputs, size: int, out: Path) -> list[_Batch]:
    total, found = inputs.model.n_routed_experts, list[_Batch]()
    for stage, first in product(range(inputs.stages or 1), range(0, total, size)):
        experts = range(first, min(first + size, total))
        name = f"experts-{f'{stage}-' if inputs.stages else ''}{first:04d}-{experts[-1]:04d}"
        found.append(_Batch(stage, experts, out / f"{name}.safetensors"))
    return found


def replay_capture(
    inputs: Inputs, clock: Clock, report: Progress, stage: int = 0, quantized: Sequence[Path] = ()
) -> RoutedTokens:
    """Run the drafter, without the experts of `stage`, on the capture; return what reaches them.

    `quantized` are the files of the experts before. The tokens are in BF16, the precision that the
    experts' inputs have in service; on the clock's device, or in host memory if they are many.
    """
    model, sequences = inputs.model, inputs.sequences
    num_tokens = sum(map(inputs.calibration_rows, sequences))
    device = clock.device if 2 * num_tokens * model.hidden_size <= RESIDENT_BYTES else "cpu"
    x = torch.empty(num_tokens, model.hidden_size, dtype=torch.bfloat16, device=device)  # [N, D]
    shape = (num_tokens, model.num_experts_per_tok)
    experts = torch.empty(shape, dtype=torch.int32, device=device)  # [N, K]
    weights = torch.empty(shape, device=device)
    start, read = 0, partial(inputs.read_sequence, device=clock.device)
    report("replay", 0, len(sequences))
    with parallel.read_ahead(read, sequences, _SEQUENCES_AHEAD) as captured:
        with clock.timed("io"):  # while the first sequences are being read
            route = _load_drafter(inputs, clock.device, stage, quantized)
        for number, sequence in enumerate(sequences, start=1):
            with clock.timed("io"):
                recorded = next(captured)
            rows = slice(start, start := start + inputs.calibration_rows(sequence))
            with clock.timed("replay", tf32=True):
                x[rows], experts[rows], weights[rows] = route(sequence, recorded)
            report("replay", number, len(sequences))
    return RoutedTokens(x, experts, model.n_routed_experts, weights if inputs.stages else None)


_Routed = tuple[Tensor, Tensor, Tensor]  # as a `RoutingRecorder` keeps it


def _load_drafter(
    inputs: Inputs, device: str, stage: int, quantized: Sequence[Path]
) -> Callable[[CapturedSequence, Recorded], _Routed]:
    """Return what says what a stage's experts are given; those of stages before are quantized."""
    others = [name for name in inputs.head.files if ".ffn.experts." not in name]
    decoded = Decoded(inputs.read_upstream(others, device))
    embed = load_tensors(inputs.base, ["embed.weight"])["embed.weight"].to(device)
    if not inputs.stages:
        head = build_head(inputs.model, decoded, with_experts=False, device=device)

        def route(sequence: CapturedSequence, recorded: Recorded) -> _Routed:
            known = sequence.calibration_tokens + 1  # at token i the head reads token i + 1
            embeds = embed[recorded.token_ids[:known].to(device)]  # [T + 1, D]
            return replay_routing(head, recorded.residual[:known], embeds)

        return route
    drafter = build_dspark(inputs.model, decoded, inputs.stages, recorded=stage, device=device)
    views = head_from_module(drafter.state_dict(), inputs.stages)
    for file in quantized:
        with Shard(file) as shard:
            decoded = Decoded(shard.read([*shard.meta]), device=device)
        for name, tensor in decoded.items():
            views[name].copy_(tensor)

    def route_blocks(sequence: CapturedSequence, recorded: Recorded) -> _Routed:
        assert recorded.taps is not None
        given = recorded.taps, recorded.token_ids, embed, sequence.prompt_tokens
        return replay_block_routing(drafter, *given, inputs.model.dspark_block_size)

    return route_blocks


def _quantize(work: _Work, batches: Sequence[_Batch], pending: Sequence[_Batch]) -> None:
    """Replay the capture, then quantize the pending batches of a stage and write their files."""
    inputs, _, clock, report = work

    def read(batch: _Batch) -> dict[str, Tensor]:
        prefixes = tuple(f"{module}." for module in batch.modules)
        names = [name for name in inputs.head.files if name.startswith(prefixes)]
        return inputs.read_upstream(names, clock.device)

    total, stage = sum(len(batch.experts) for batch in batches), pending[0].stage
    done = sum(len(batch.experts) for batch in batches if batch.is_done())
    # The first experts come in while the sequences are replayed.
    with (
        parallel.read_ahead(read, pending, _BATCHES_AHEAD) as upstream,
        parallel.write_behind(2) as write,  # while one batch is synced, another can be copied
    ):
        before = [batch.file for batch in batches if batch.stage < stage]
        routed = replay_capture(inputs, clock, report, stage, before)
        report("gptq", done, total)
        for batch in pending:
            with clock.timed("io"):
                tensors = next(upstream)
            packed, known = _quantize_batch(work, routed, tensors, batch)
            with clock.timed("io"):
                write(_save_batch, packed, known, batch.file)
            done += len(batch.experts)
            report("gptq", done, total)


def _quantize_batch(
    work: _Work, routed: RoutedTokens, upstream: Mapping[str, Tensor], batch: _Batch
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the batch's packed experts, and its token counts and relative errors."""
    inputs, settings, clock, _ = work
    with inputs.head.named(), clock.timed("hessian", tf32=True):
        decoded, modules, experts = decode_head(upstream), batch.modules, batch.experts
        weights = {  # f32, w1 and w3 [E, M, D] and w2 [E, D, M]
            matrix: torch.stack([decoded[f"{e}.{matrix}.weight"] for e in modules])
            for matrix in MATRICES
        }
        tokens = [routed.of_expert(e) for e in experts]
        limit = inputs.model.swiglu_limit
        hessians = head_experts.expert_hessians(tokens, weights, limit)  # of w1, w2, w3
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


def _report(work: _Work, batches: Sequence[_Batch]) -> dict[str, Any]:
    """Return the stage's result, from what is known of every batch."""
    inputs, settings, clock, _ = work
    known = [json.loads(batch.file.with_suffix(".json").read_text()) for batch in batches]
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
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),  # 0 where CUDA is not in use
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
    experts = {name: tensor for name, tensor in stored.items() if ".ffn.experts." in name}
    # weight_shape, two int64 a matrix, is bookkeeping and not part of a weight.
    codes = sum(t.nbytes for name, t in experts.items() if not name.endswith("_shape"))
    model = inputs.model
    weights = len(errors["w1"]) * 3 * model.hidden_size * model.moe_intermediate_size
    all_errors = [error for matrix in MATRICES for error in errors[matrix]]
    return {
        "bits_per_weight": 8 * codes / weights,
        "rel_error": sum(all_errors) / len(all_errors),
        "bytes": sum(tensor.nbytes for tensor in stored.values()),
    }
