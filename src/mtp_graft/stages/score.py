"""Score: how often the server would accept each variant's drafts, before anything is served.

The capture has what the base said; the replay has what a head drafts after every token. Stepping
through them as the server does (two tokens forward on a hit, one on a miss) gives the acceptance.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.manifest import (
    claim_folder,
    fingerprints,
    finished_result,
    read_result,
    write_manifest,
)
from mtp_graft.checkpoint.shards import Shard
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.replay import build_head, replay_drafts
from mtp_graft.dsv4.variants import Variant, decode_head, store_head
from mtp_graft.errors import GraftError
from mtp_graft.recipe import ScoreSection
from mtp_graft.serving.metrics import wilson_interval
from mtp_graft.stages.inputs import (
    EVALUATION,
    REPORT_NAME,
    Inputs,
    Progress,
    open_inputs,
    single_thread,
)
from mtp_graft.stages.parallel import rank_device
from mtp_graft.stages.quantize import GPTQ


def score(
    capture: Path,
    quantized: Path,
    upstream: Path,
    base: Path,
    out: Path,
    variants: Sequence[Variant],
    settings: ScoreSection,
    report: Progress,
) -> dict[str, Any]:
    """Write the acceptance of `variants` to `out/report.json` and return it.

    A finished variant is not scored again. Raises GraftError for inputs that do not fit each
    other, a capture that leaves nothing to draft, and if `out` is of another configuration.
    """
    started = time.perf_counter()
    device = rank_device(settings.device)
    inputs = _open(capture, upstream, base)
    experts = _gptq_files(quantized) if "gptq" in variants else []
    files = [*inputs.files("embed.weight", "head.weight"), *experts]
    decisive = {"variants": list(variants), "device": device}
    claim_folder(out, {**decisive, "inputs": fingerprints(files)})
    if (finished := finished_result(out, REPORT_NAME)) is not None:
        return finished
    with single_thread():
        acceptance = {}
        for variant in variants:
            path = out / f"{variant}.json"
            if (scored := read_result(path)) is None:
                scored = _score(inputs, variant, experts, device, report)
                write_json(scored, path)
            acceptance[variant] = scored
    result = {"acceptance": acceptance, "split": EVALUATION, "replay": "true attention"}
    write_json(result, out / REPORT_NAME)
    seconds = time.perf_counter() - started
    write_manifest(out, "score", decisive, inputs.indexes(), device, seconds)
    return result


def _open(capture: Path, upstream: Path, base: Path) -> Inputs:
    inputs = open_inputs(capture, upstream, base, EVALUATION)
    if not any(s.tokens >= s.prompt_tokens + 2 for s in inputs.sequences):
        raise GraftError(
            f"{capture}: nothing to draft in split {EVALUATION!r} ({len(inputs.sequences)} "
            "sequences); expected sequences with at least two tokens after the prompt"
        )
    return inputs


def _gptq_files(quantized: Path) -> list[Path]:
    files = sorted((quantized / GPTQ).glob("experts-*.safetensors"))
    if not files:
        raise GraftError(
            f"{quantized / GPTQ}: no quantized experts; run `mtp-graft quantize` first, "
            "or leave gptq out of the variants"
        )
    return files


def _score(
    inputs: Inputs, variant: Variant, gptq_files: Sequence[Path], device: str, report: Progress
) -> dict[str, Any]:
    """Return the acceptance of one variant, over all sequences and of each."""
    label, total = f"score {variant}", len(inputs.sequences)
    report(label, 0, total)
    head = _load_head(inputs, variant, gptq_files, device)
    embed = inputs.read_base("embed.weight")  # [V, D]
    lm_head = inputs.read_base("head.weight").to(head.h_proj.weight)  # [V, D]
    sequences: list[dict[str, Any]] = []
    for done, sequence in enumerate(inputs.sequences, start=1):
        recorded, start = inputs.read_sequence(sequence), sequence.prompt_tokens
        embeds = embed[recorded.token_ids]  # [T, D]
        drafts = replay_drafts(head, lm_head, recorded.residual, embeds, start=start - 1)
        made, accepted = count_drafts(drafts.tolist(), recorded.token_ids[start:].tolist())
        sequences.append({"id": sequence.id, "drafts": made, "accepted": accepted})
        report(label, done, total)
    made = sum(sequence["drafts"] for sequence in sequences)
    accepted = sum(sequence["accepted"] for sequence in sequences)
    return {
        "top1": accepted / made,
        "tokens": made,
        "accepted": accepted,
        "interval": list(wilson_interval(accepted, made)),
        "sequences": sequences,
    }


def _load_head(
    inputs: Inputs, variant: Variant, gptq_files: Sequence[Path], device: str
) -> MTPHead:
    experts: dict[str, Tensor] = {}
    if variant == "gptq":
        for path in gptq_files:
            with Shard(path) as file:
                experts |= file.read(file.meta)
    upstream = inputs.read_upstream([*inputs.shards])
    decoded = decode_head(store_head(upstream, variant, experts))
    return build_head(inputs.model, decoded, device=device)


def count_drafts(drafts: Sequence[int], continuation: Sequence[int]) -> tuple[int, int]:
    """Return how many drafts the server makes on a greedy continuation, and how many it accepts.

    `continuation` are the tokens after the prompt. The first of them comes with the prompt and
    cannot be drafted; `drafts[i]` is the head's guess at `continuation[i + 1]`, made when
    `continuation[i]` is the newest token. A hit gives two tokens in one step: the draft and the
    base's own next one.
    """
    i = made = accepted = 0
    while i + 1 < len(continuation):
        made += 1
        hit = drafts[i] == continuation[i + 1]
        accepted += hit
        i += 2 if hit else 1
    return made, accepted
