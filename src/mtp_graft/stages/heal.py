"""Heal: train the head's dense part for this base and k drafts, and keep it if it drafts better.

    capture      the calibration texts to train on, the evaluation texts to judge by
    quantized    the routed experts, which stay as they will be served
    -> upstream/ the head as a master has it, its dense part trained

Judged is the accepted length, as `score` counts it. A killed run's training goes on.
"""

import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence

from mtp_graft.checkpoint.capture import INDEX_NAME, TEXTS_NAME, CapturedSequence
from mtp_graft.checkpoint.files import replacing, write_json
from mtp_graft.checkpoint.quant_manifest import HEALED_NAME, hashes
from mtp_graft.checkpoint.shards import load_tensors, save_shard, write_index
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.heal import EXPERTS, OUTPUT, ROUTER, BaseOutput, Batch, distance, trained_parts
from mtp_graft.dsv4.names import head_from_module
from mtp_graft.dsv4.replay import build_head, replay_drafts
from mtp_graft.dsv4.variants import Decoded
from mtp_graft.errors import GraftError
from mtp_graft.quant import encode_fp8
from mtp_graft.recipe import HealSection, LinearDtype, Variant
from mtp_graft.serving.metrics import Step, count_steps, drafting_result
from mtp_graft.stages import inputs as stage_inputs
from mtp_graft.stages.inputs import CALIBRATION, EVALUATION, HEALED, Inputs, Progress
from mtp_graft.stages.parallel import find_device
from mtp_graft.stages.score import draft_steps

_Named = Mapping[str, Tensor]
_SHARD, _STATE = "healed.safetensors", "state.pt"
_RESAMPLES, _ENDS = 2000, (0.025, 0.975)
#: At how many of the places first drafts may be right no more: half a point.
_MAY_LOSE = 0.005


def heal(
    capture: Path,
    quantized: Path,
    upstream: Path,
    base: Path,
    out: Path,
    variant: Variant,
    linear_dtype: LinearDtype,
    group_size: int,
    settings: HealSection,
    report: Progress,
) -> dict[str, Any]:
    """Train the head, write it to `out/upstream`, and return the report; GraftError as `score`.

    What `splice` will store in FP8, by `variant` and `linear_dtype`, is rounded while trained.
    `kept` says whether the accepted length of `settings.k` drafts rose beyond its 95 % interval
    (texts resampled, in pairs) while the first draft's acceptance fell by half a point at most.
    `before` and `after` have `by_position`, `length` and its `interval`, `curve` the same by step.
    """
    started, device = time.perf_counter(), find_device(settings.device)
    models = capture, upstream, base
    inputs, held_out = (_open(*models, split, settings.k) for split in (CALIBRATION, EVALUATION))
    experts = stage_inputs.expert_files(quantized) if variant == "gptq" else []
    decisive = asdict(settings) | {"variant": variant, "device": device}
    decisive["linear_dtype"] = linear_dtype
    decisive["batches"] = "of like lengths"  # a state with other ones is not gone on from
    if (finished := inputs.claim(out, decisive, *held_out.files, *experts)) is not None:
        return finished
    stored = inputs.store(variant, experts, group_size=group_size, linear_dtype=linear_dtype)
    decoded = Decoded(stored, group_size=group_size, device=device)
    head = build_head(inputs.model, decoded, device=device)
    if device != "cpu":
        head.layer.mlp.experts.bfloat16()  # as the server computes with them
    read = load_tensors(inputs.base, ["embed.weight", *OUTPUT]).items()
    given = {name: tensor.to(device) for name, tensor in read}
    fp8 = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    parts = trained_parts(head, fp8, (EXPERTS,) if settings.router else (EXPERTS, ROUTER))
    state = _train(head, parts, given, inputs, held_out, settings, out / _STATE, report)
    result = _judge(state["curve"]) | {
        "steps": settings.steps,
        "tokens": sum(s.tokens for s in inputs.sequences),
        "seconds": time.perf_counter() - started,
    }
    master = inputs.read_upstream([*inputs.head.files])
    about = {**decisive, **result, "upstream": hashes(inputs.head.files.values())}
    about["capture"] = hashes(p for n in (INDEX_NAME, TEXTS_NAME) if (p := capture / n).exists())
    _write_master(head_from_module(state["best"]), master, fp8, out / HEALED, about)
    inputs.finish(out, "heal", decisive, result, result["seconds"])
    return result


def _open(capture: Path, upstream: Path, base: Path, split: str, k: int) -> Inputs:
    """Return the inputs with the texts of a split that have all drafts of a step."""
    inputs = stage_inputs.open_inputs(capture, upstream, base, split, "embed.weight", "head.weight")
    if inputs.stages:
        found = "has a DSpark drafter, which was trained for blocks already"
        raise GraftError(f"{upstream}: {found}; expected an MTP head: leave [heal] out")
    texts = [s for s in inputs.sequences if s.tokens > s.prompt_tokens + k]
    if not texts:
        found = f"no text of split {split!r} has more than {k} tokens after its prompt"
        raise GraftError(f"{capture}: {found}; capture more, or longer ones")
    return replace(inputs, sequences=texts)


def _train(
    head: MTPHead,
    parts: Mapping[str, nn.Parameter],
    given: _Named,
    inputs: Inputs,
    held_out: Inputs,
    settings: HealSection,
    path: Path,
    report: Progress,
) -> dict[str, Any]:
    """Return the state after the last step, with the `best` parts; it is kept in `path`."""
    base, embed = BaseOutput(inputs.model, given), given["embed.weight"]
    optimizer = torch.optim.AdamW(parts.values(), settings.lr, (0.9, 0.95), weight_decay=0.0)
    warm_up = min(50 / settings.steps, 0.5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, settings.steps, pct_start=warm_up, cycle_momentum=False
    )
    kept: dict[str, Any] = {"optimizer": optimizer, "schedule": schedule}
    state: dict[str, Any] = {"step": 0, "curve": [], "parts": {}, "best": {}}

    def look(loss: float | None) -> None:
        """Judge the head as it is, and write the state."""
        found = _evaluate(head, given["head.weight"], embed, held_out, settings)
        values = {name: part.detach().clone() for name, part in parts.items()}
        state["curve"].append({"step": state["step"], "loss": loss, **found})
        if _best(state["curve"]) is state["curve"][-1]:
            state["best"] = values
        saved = state | {"parts": values} | {name: o.state_dict() for name, o in kept.items()}
        with replacing(path) as file:
            torch.save(saved, file)

    if path.exists():
        saved = torch.load(path, map_location=embed.device)
        for name, o in kept.items():
            o.load_state_dict(saved[name])
        for name, part in parts.items():
            part.data.copy_(saved["parts"][name])
        state = {name: saved[name] for name in state}
    else:
        look(None)
    weights = [settings.decay**draft for draft in range(settings.k)]
    batches = islice(_batches(inputs.sequences, settings.batch_tokens), state["step"], None)
    for step, chosen in zip(range(state["step"] + 1, settings.steps + 1), batches, strict=False):
        length = state["curve"][-1]["length"]
        report(f"heal: {length:.3f} tokens a step on held-out texts", step, settings.steps)
        batch = _read_batch(inputs, chosen, embed)
        optimizer.zero_grad()
        with parametrize.cached(), _precision(embed.device):
            loss = distance(head, base, batch, settings.loss, weights, recompute=settings.recompute)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.values(), 1.0)
        optimizer.step()
        schedule.step()
        state["step"] = step
        if step % settings.look_every == 0 or step == settings.steps:
            look(float(loss.detach()))
    return state


def _batches(sequences: Sequence[CapturedSequence], tokens: int) -> Iterator[list[Any]]:
    """Yield the batches of one epoch after the other, for ever; each has its own order."""
    for epoch in count():
        generator = torch.Generator().manual_seed(epoch)
        shuffled = torch.randperm(len(sequences), generator=generator).tolist()
        batches = [*_in_batches([sequences[number] for number in shuffled], tokens)]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[number]


def _in_batches(sequences: Sequence[CapturedSequence], tokens: int) -> Iterator[list[Any]]:
    """Yield sequences of like lengths: padded, so many tokens at most, or one that is longer."""
    chosen: list[CapturedSequence] = []
    for sequence in sorted(sequences, key=lambda each: each.tokens):
        if chosen and (len(chosen) + 1) * sequence.tokens > tokens:
            yield chosen
            chosen = []
        chosen.append(sequence)
    yield chosen


def _precision(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in BF16 on a GPU, as the server does, and in float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, device.type != "cpu")


def _read_batch(inputs: Inputs, chosen: Sequence[CapturedSequence], embed: Tensor) -> Batch:
    recorded = [inputs.read_sequence(each, str(embed.device)) for each in chosen]
    token_ids = [each.token_ids for each in recorded]
    lengths = torch.tensor([*map(len, token_ids)], device=embed.device)
    embeds = [embed[ids.to(embed.device)] for ids in token_ids]
    residual = pad_sequence([each.residual for each in recorded], batch_first=True)
    return Batch(residual, pad_sequence(embeds, batch_first=True), lengths, token_ids)


def _evaluate(
    head: MTPHead, lm_head: Tensor, embed: Tensor, held_out: Inputs, settings: HealSection
) -> dict[str, Any]:
    """Return `length`, `by_position`, and of each of the `texts` its tokens and steps.

    `first` is the share of all places at which the first draft is right: it compares heads at the
    same places, unlike `by_position`, which has those at which a step begins.
    """
    texts: list[list[Step]] = []
    firsts: list[bool] = []
    with parametrize.cached(), _precision(embed.device):
        lm_head = lm_head.to(head.h_proj.weight)
        for chosen in _in_batches(held_out.sequences, settings.batch_tokens):
            batch = _read_batch(held_out, chosen, embed)
            drafts = replay_drafts(head, lm_head, batch.residual, batch.embeds, k=settings.k)
            for sequence, ids, made in zip(chosen, batch.token_ids, drafts.tolist(), strict=True):
                drafted, text = (x[sequence.prompt_tokens :] for x in ([[], *made], ids.tolist()))
                texts.append([*draft_steps(drafted, text)])
                firsts += [a[0] == b for a, b in zip(drafted, text[1:], strict=False)]
    found = drafting_result(count_steps([step for steps in texts for step in steps]))
    return {
        "length": found["acceptance_length"],
        "by_position": found["acceptance_by_position"],
        "first": sum(firsts) / len(firsts),
        "texts": [(sum(s.accepted + 1 for s in steps), len(steps)) for steps in texts],
    }


def _best(curve: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the point with the longest accepted length whose first draft has not lost more."""
    least = curve[0]["first"] - _MAY_LOSE
    return max((p for p in curve if p["first"] >= least), key=lambda p: p["length"])


def _judge(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return first and best point, with intervals, whether the best is kept, and the curve."""
    points = curve[0], _best(curve)
    counts = np.array([point["texts"] for point in points], float)  # [2, texts, tokens and steps]
    size = (_RESAMPLES, counts.shape[1])
    chosen = counts[:, np.random.default_rng(0).integers(counts.shape[1], size=size)].sum(axis=2)
    lengths = chosen[..., 0] / chosen[..., 1]  # [2, resamples]
    low, high = np.quantile(lengths[1] - lengths[0], _ENDS)
    before, after = (
        {key: point[key] for key in ("by_position", "length", "first")}
        | {"interval": np.quantile(resampled, _ENDS).tolist()}
        for point, resampled in zip(points, lengths, strict=True)
    )
    return {
        "kept": bool(low > 0),
        "before": before,
        "after": after,
        "gain": [float(low), float(high)],
        "curve": [{k: v for k, v in point.items() if k != "texts"} for point in curve],
    }


def _write_master(
    parts: _Named, master: _Named, fp8: Container[str], out: Path, about: Mapping[str, Any]
) -> None:
    """Write the master with the trained parts, those named in `fp8` in FP8 blocks, and `about`."""
    head = dict(master)
    for name, value in parts.items():
        scale = name.removesuffix("weight") + "scale"
        if name in fp8:
            head[name], head[scale] = encode_fp8(value.cpu())
        else:
            was_quantized = head.pop(scale, None) is not None
            head[name] = value.cpu().to(torch.bfloat16 if was_quantized else master[name].dtype)
    out.mkdir(exist_ok=True)
    save_shard(head, out / _SHARD)
    said = {k: v for k, v in about.items() if k not in ("seconds", "curve")}
    said["trained"] = {name: str(head[name].dtype).removeprefix("torch.") for name in sorted(parts)}
    write_json(said, out / HEALED_NAME)
    write_index(dict.fromkeys(head, _SHARD), sum(t.nbytes for t in head.values()), out)
