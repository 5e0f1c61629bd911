"""The answers that the bench stage recorded: what each step brought, and where two texts part."""

from collections.abc import Mapping
from typing import Any

from mtp_graft.bench.decode import Turn, median_round, shared_length

Json = Mapping[str, Any]


def recorded_answers(base: Turn | None, mtp: Turn | None) -> dict[str, Any] | None:
    """Return the answers of the rounds with the median speed; None if there are none.

    Keys: `base` and `mtp`, each with `round` (from 1) and `rounds`; and `answers`, for each prompt
    `id`, `divergence` (the first token that differs, None if none does), `base` and `mtp`: `k` (0:
    nothing was drafted), `counters` (the server's), `seconds`, `tokens` and `steps` [{`at` (seconds
    from the request), `start` (its first token), `tokens`, `text`, `apart` (whether the other
    answer differs by then), `accepted` (drafts), `acceptance` (so far, None where unknown)}].
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
    divergence = None if base["token_ids"] == mtp["token_ids"] else same
    sides = {"base": _answer(base, same), "mtp": _answer(mtp, same)}
    return {"id": prompt, "divergence": divergence, **sides}


def _answer(answer: Json, same: int) -> dict[str, Any]:
    """Return an answer's steps, a chunk each; its first `same` tokens are the other's, too.

    A chunk has the accepted drafts, then one token of the step's own; the first is prefill's.
    """
    counters = answer["counters"]
    k = counters["num_draft_tokens"] // max(1, counters["num_drafts"]) if counters else 0
    steps: list[dict[str, Any]] = []
    start = accepted = 0
    for n, ((at, size), text) in enumerate(zip(answer["chunks"], answer["texts"], strict=True)):
        new = min(size - 1, k) if n else 0  # a slow client gets several steps in one chunk
        accepted += new
        step = {"at": round(at, 6), "start": start, "tokens": size, "text": text, "accepted": new}
        rate = accepted / (n * k) if n and k else None
        steps.append(step | {"apart": start + size > same, "acceptance": rate})
        start += size
    seconds = answer["chunks"][-1][0]
    return {"k": k, "counters": counters, "seconds": seconds, "tokens": start, "steps": steps}
