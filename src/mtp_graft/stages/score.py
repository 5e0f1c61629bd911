"""Score: how often the server would accept each variant's drafts, before anything is served.

The capture has what the base said; the replay has what a head drafts after every token. Stepping
through them as the server does (two tokens forward on a hit, one on a miss) gives the acceptance.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtp_graft.checkpoint import manifest
from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.replay import build_head, replay_drafts
from mtp_graft.dsv4.variants import decode_head, store_head
from mtp_graft.errors import GraftError
from mtp_graft.recipe import QuantizeSection, ScoreSection, Variant
from mtp_graft.serving.metrics import wilson_interval
from mtp_graft.stages.inputs import (
    EVALUATION,
    REPORT_NAME,
    Inputs,
    Progress,
    Tensors,
    expert_files,
    open_inputs,
)
from mtp_graft.stages.parallel import find_device, single_thread

#: Variants that hold upstream's values exactly: their drafts are the same, and made once.
_EXACT: tuple[Variant, ...] = ("mxfp4", "bf16")


def score(
    capture: Path,
    quantized: Path,
    upstream: Path,
    base: Path,
    out: Path,
    heads: QuantizeSection,
    settings: ScoreSection,
    report: Progress,
) -> dict[str, Any]:
    """Write the acceptance of each of the `heads.variants` to `out/report.json` and return it.

    A finished variant is not scored again. Raises GraftError for inputs that do not fit each
    other, a capture that leaves nothing to draft, and if `out` is of another configuration.
    """
    started, device = time.perf_counter(), find_device(settings.device)
    inputs = _open(capture, upstream, base)
    experts = expert_files(quantized) if "gptq" in heads.variants else []
    decisive = {"variants": list(heads.variants), "group_size": heads.group_size, "device": device}
    found = manifest.fingerprints([*inputs.files, *experts])
    manifest.claim_folder(out, {**decisive, "inputs": found})
    if (finished := manifest.finished_result(out, REPORT_NAME)) is not None:
        return finished
    acceptance: dict[Variant, dict[str, Any]] = {}
    for variant in heads.variants:
        path = out / f"{variant}.json"
        if (scored := manifest.read_result(path)) is None:
            same = [acceptance[v] for v in _EXACT if v in acceptance and variant in _EXACT]
            scored = same[0] if same else _score(inputs, variant, heads, experts, device, report)
            write_json(scored, path)
        acceptance[variant] = scored
    result = {"acceptance": acceptance, "split": EVALUATION}
    write_json(result, out / REPORT_NAME)
    seconds = time.perf_counter() - started
    manifest.write_manifest(out, "score", decisive, inputs.indexes(), device, seconds)
    return result


def _open(capture: Path, upstream: Path, base: Path) -> Inputs:
    inputs = open_inputs(capture, upstream, base, EVALUATION, "embed.weight", "head.weight")
    if not any(s.tokens >= s.prompt_tokens + 2 for s in inputs.sequences):
        raise GraftError(
            f"{capture}: nothing to draft in split {EVALUATION!r} ({len(inputs.sequences)} "
            "sequences); expected sequences with at least two tokens after the prompt"
        )
    return inputs


@single_thread()
def _score(
    inputs: Inputs,
    variant: Variant,
    heads: QuantizeSection,
    experts: Sequence[Path],
    device: str,
    report: Progress,
) -> dict[str, Any]:
    """Return the acceptance of one variant, over all sequences and of each."""
    label, total = f"score {variant}", len(inputs.sequences)
    report(label, 0, total)
    group_size, upstream = heads.group_size, inputs.read_upstream([*inputs.head.files])
    with Tensors.in_files(experts).opened() as gptq:
        stored = store_head(upstream, variant, gptq, group_size=group_size)
    head = build_head(inputs.model, decode_head(stored, group_size=group_size), device=device)
    base = load_tensors(inputs.base, ["embed.weight", "head.weight"])
    embed, lm_head = base["embed.weight"], base["head.weight"].to(head.h_proj.weight)  # [V, D]
    sequences: list[dict[str, Any]] = []
    for done, sequence in enumerate(inputs.sequences, start=1):
        recorded, start = inputs.read_sequence(sequence), sequence.prompt_tokens
        embeds = embed[recorded.token_ids]  # [T, D]
        drafts = replay_drafts(head, lm_head, recorded.residual, embeds, start=start - 1)
        made, accepted = count_drafts(drafts.tolist(), recorded.token_ids[start:].tolist())
        sequences.append({"id": sequence.id, "drafts": made, "accepted": accepted})
        report(label, done, total)
    made, accepted = (sum(s[key] for s in sequences) for key in ("drafts", "accepted"))
    return {
        "top1": accepted / made,
        "tokens": made,
        "accepted": accepted,
        "interval": list(wilson_interval(accepted, made)),
        "sequences": sequences,
    }


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
