"""Score: how often the server would accept each variant's drafts, before anything is served.

The capture has what the base said; the replay has what a head drafts after every token. Stepping
through them as the server does (one token forward, and one more for each hit) gives the acceptance.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mtp_graft.checkpoint.capture import Recorded
from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.manifest import read_result
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.dspark import DSpark
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.replay import build_dspark, build_head, replay_blocks, replay_drafts
from mtp_graft.dsv4.variants import Decoded
from mtp_graft.errors import GraftError
from mtp_graft.recipe import QuantizeSection, ScoreSection, Variant
from mtp_graft.serving.metrics import Step, count_steps, drafting_result, wilson_interval
from mtp_graft.stages.inputs import EVALUATION, Inputs, Progress, expert_files, open_inputs
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

    Raises GraftError for inputs that do not fit each other, a capture that leaves nothing to draft,
    and if `out` is of another configuration. A finished variant is not scored again.

    Of a variant, `top1` is the acceptance of single drafts (`accepted` of `tokens`, and for each of
    the `sequences`); `by_position` and `length` are those of `settings.k` drafts a step, each
    position given that those before it were accepted; `by_k` has all fewer, as a server counts.
    """
    started, device = time.perf_counter(), find_device(settings.device)
    inputs = open_inputs(capture, upstream, base, EVALUATION, "embed.weight", "head.weight")
    if not any(s.tokens >= s.prompt_tokens + 2 for s in inputs.sequences):
        found = f"nothing to draft in split {EVALUATION!r} ({len(inputs.sequences)} sequences)"
        expected = "expected sequences with at least two tokens after the prompt"
        raise GraftError(f"{capture}: {found}; {expected}")
    experts = expert_files(quantized) if "gptq" in heads.variants else []
    decisive = {"variants": list(heads.variants), "group_size": heads.group_size}
    decisive |= {"device": device, "k": settings.k}
    if (finished := inputs.claim(out, decisive, *experts)) is not None:
        return finished
    acceptance: dict[Variant, dict[str, Any]] = {}
    for variant in heads.variants:
        path = out / f"{variant}.json"
        if (scored := read_result(path)) is None:
            same = [acceptance[v] for v in _EXACT if v in acceptance and variant in _EXACT]
            given = inputs, variant, experts, heads.group_size, device
            scored = same[0] if same else _score(inputs, _load(*given), variant, settings.k, report)
            write_json(scored, path)
        acceptance[variant] = scored
    result = {"acceptance": acceptance, "split": EVALUATION}
    inputs.finish(out, "score", decisive, result, time.perf_counter() - started)
    return result


@single_thread()
def _load(
    inputs: Inputs, variant: Variant, experts: Sequence[Path], group_size: int, device: str
) -> MTPHead | DSpark:
    stored = inputs.store(variant, experts, group_size=group_size)
    decoded = Decoded(stored, group_size=group_size, device=device)
    if inputs.stages:
        return build_dspark(inputs.model, decoded, inputs.stages, device=device)
    return build_head(inputs.model, decoded, device=device)


@single_thread()
def _score(
    inputs: Inputs, drafter: MTPHead | DSpark, variant: Variant, k: int, report: Progress
) -> dict[str, Any]:
    """Return the acceptance of one variant, over all sequences and of each."""
    label, total = f"score {variant}", len(inputs.sequences)
    report(label, 0, total)
    base = load_tensors(inputs.base, ["embed.weight", "head.weight"])
    base["head.weight"] = base["head.weight"].to(next(drafter.parameters()))
    sequences: list[dict[str, Any]] = []
    steps: dict[int, list[Step]] = {most: [] for most in range(1, k + 1)}  # by drafts a step
    for done, sequence in enumerate(inputs.sequences, start=1):
        recorded, start = inputs.read_sequence(sequence), sequence.prompt_tokens
        continuation = recorded.token_ids[start:].tolist()
        drafts = _drafts(drafter, base, recorded, start, k)
        found = {most: [*draft_steps(made, continuation)] for most, made in drafts.items()}
        steps = {most: [*before, *found[most]] for most, before in steps.items()}
        accepted = sum(step.accepted for step in found[1])
        sequences.append({"id": sequence.id, "drafts": len(found[1]), "accepted": accepted})
        report(label, done, total)
    made, accepted = (sum(s[key] for s in sequences) for key in ("drafts", "accepted"))
    by_k = {str(most): drafting_result(count_steps(found)) for most, found in steps.items()}
    return {
        "top1": accepted / made,
        "tokens": made,
        "accepted": accepted,
        "interval": list(wilson_interval(accepted, made)),
        "by_position": by_k[str(k)]["acceptance_by_position"],
        "length": by_k[str(k)]["acceptance_length"],
        "by_k": by_k,
        "sequences": sequences,
    }


def _drafts(
    drafter: MTPHead | DSpark, base: Mapping[str, Tensor], recorded: Recorded, start: int, k: int
) -> dict[int, list[list[int]]]:
    """Return for 1 to k drafts a step those that follow each token from `start` on."""
    counts, embed, lm_head = range(1, k + 1), base["embed.weight"], base["head.weight"]
    if isinstance(drafter, DSpark):  # whose rows of fewer see each other alone
        assert recorded.taps is not None
        text = recorded.taps, recorded.token_ids, embed, start
        return {n: replay_blocks(drafter, lm_head, *text, n).tolist() for n in counts}
    given = recorded.residual[None], embed[recorded.token_ids][None]
    drafts = replay_drafts(drafter, lm_head, *given, start=start - 1, k=k)[0]
    return {n: drafts[:, :n].tolist() for n in counts}


def draft_steps(drafts: Sequence[Sequence[int]], continuation: Sequence[int]) -> Iterator[Step]:
    """Yield the steps in which a server drafts and verifies a greedy continuation.

    `continuation` are the tokens after the prompt, the first of which cannot be drafted;
    `drafts[i]` has guesses at those from `continuation[i + 1]` on; past the end they do not count.
    A step gives its accepted drafts and the base's own next token.
    """
    i = 0
    while following := continuation[i + 1 :]:
        pairs = list(zip(drafts[i], following, strict=False))
        accepted = next((n for n, (draft, token) in enumerate(pairs) if draft != token), len(pairs))
        yield Step(len(pairs), accepted)
        i += accepted + 1
