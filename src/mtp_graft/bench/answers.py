"""The answers that the bench stage recorded: what each step brought, and where two texts part."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from mtp_graft.bench.decode import Turn, median_round, shared_length

Json = Mapping[str, Any]


def recorded_answers(base: Turn | None, mtp: Turn | None) -> dict[str, Any] | None:
    """Return the answers of the rounds with the median speed; None if there are none.

    Keys: `base` and `mtp`, each with `round` (from 1) and `rounds`; and `answers`, for each prompt
    `id`, `divergence` (the first token that differs, None if none does), `base` and `mtp`, each
    with `seconds`, `tokens` and `steps` [{`at` (seconds from the request), `start` (its first
    token), `tokens`, `text`, `apart` (whether the other answer differs by then), `accepted`
    (drafts), `acceptance` (so far)}]. `mtp` has the server's `counters`, too (None if it counted
    nothing), and `drafts_per_step`, None, as are a step's `accepted` and `acceptance`, where chunks
    and counters do not agree.
    """
    if base is None or mtp is None:
        return None
    chosen = [median_round(turn) for turn in (base, mtp)]
    rounds = [turn["rounds"][number] for turn, number in zip((base, mtp), chosen, strict=True)]
    return {
        "base": {"round": chosen[0] + 1, "rounds": len(base["rounds"])},
        "mtp": {"round": chosen[1] + 1, "rounds": len(mtp["rounds"])},
        "answers": [_compare(*pair) for pair in zip(base["prompts"], *rounds, strict=True)],
    }


def _compare(prompt: str, base: Json, mtp: Json) -> dict[str, Any]:
    same = shared_length(base["token_ids"], mtp["token_ids"])
    accepted = accepted_drafts(mtp)
    return {
        "id": prompt,
        "divergence": None if base["token_ids"] == mtp["token_ids"] else same,
        "base": _answer(base, None, same),
        "mtp": {
            **_answer(mtp, accepted, same),
            "drafts_per_step": _per_step(mtp) if accepted else None,
            "counters": mtp["counters"],
        },
    }


def accepted_drafts(answer: Json) -> list[int] | None:
    """Return how many drafts each chunk brought, prefill's 0 first; None if that is not known.

    A step's tokens come in one chunk: the accepted drafts, then one token of its own. But a slow
    client gets several steps in one chunk, so the server's counters have to agree.
    """
    counted, sizes = answer["counters"], [size for _, size in answer["chunks"]]
    if counted is None or sizes[0] != 1 or counted["num_drafts"] != len(sizes) - 1:
        return None
    accepted = [size - 1 for size in sizes]
    # Where the answer's end cuts the last step short, its own token is missing first.
    accepted[-1] += counted["num_accepted_tokens"] - sum(accepted)
    per_step = _per_step(answer)
    whole = per_step * counted["num_drafts"] == counted["num_draft_tokens"]
    if not whole or accepted[-1] < sizes[-1] - 1 or max(accepted) > per_step:
        return None
    return accepted


def _per_step(answer: Json) -> int:
    counted = answer["counters"]
    return counted["num_draft_tokens"] // max(1, counted["num_drafts"])


def _answer(answer: Json, accepted: Sequence[int] | None, same: int) -> dict[str, Any]:
    """Return an answer's steps; its first `same` tokens are the other's, too."""
    steps, start = [], 0
    so_far = list(accumulate(accepted or ()))
    for n, ((at, size), text) in enumerate(zip(answer["chunks"], answer["texts"], strict=True)):
        rate = so_far[n] / (n * _per_step(answer)) if accepted and n else None
        steps.append(
            {
                "at": round(at, 6),
                "start": start,
                "tokens": size,
                "text": text,
                "apart": start + size > same,
                "accepted": accepted[n] if accepted else None,
                "acceptance": rate,
            }
        )
        start += size
    return {"seconds": answer["chunks"][-1][0], "tokens": start, "steps": steps}
