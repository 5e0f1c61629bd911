"""The answers that the bench stage recorded: what each step brought, and where two texts part."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from mtp_graft.bench.decode import shared_length

Json = Mapping[str, Any]
#: Text and how it is marked: `draft` (accepted), `own` (the step's own token), or `mixed` where
#: the two cannot be told apart; with ` apart` where the other answer differs.
Piece = tuple[str, str]


def recorded_answers(recorded: Json | None) -> list[dict[str, Any]]:
    """Return each prompt's answers without and with MTP; none if they were not recorded.

    `recorded` has `prompts` (ids), `base` and `mtp`, as `bench.decode.median_round`. Keys: `id`,
    `divergence` (the first token that differs, None if none does), `base` and `mtp`, each with
    `seconds`, `tokens` and `steps` [{`at` (seconds from the request), `start` (its first token),
    `tokens`, `accepted` (drafts), `acceptance` (so far), `pieces`}]. `mtp` has the server's
    `counters`, too (None if it counted nothing), and `drafts_per_step`, None, as is each step's
    `accepted`, where chunks and counters do not agree.
    """
    if recorded is None or recorded["base"] is None or recorded["mtp"] is None:
        return []
    pairs = zip(
        recorded["prompts"], recorded["base"]["timed"], recorded["mtp"]["timed"], strict=True
    )
    return [_compare(*pair) for pair in pairs]


def _compare(prompt: str, base: Json, mtp: Json) -> dict[str, Any]:
    same = shared_length(base["token_ids"], mtp["token_ids"])
    shared_chars = shared_length("".join(base["texts"]), "".join(mtp["texts"]))
    accepted = accepted_drafts(mtp)
    base_pieces = [[(text, "own")] for text in base["texts"]]
    mtp_pieces = _split_steps(mtp, accepted, _single_tokens(base, same))
    return {
        "id": prompt,
        "divergence": None if base["token_ids"] == mtp["token_ids"] else same,
        "base": _answer(base, None, _mark_difference(base_pieces, shared_chars)),
        "mtp": {
            **_answer(mtp, accepted, _mark_difference(mtp_pieces, shared_chars)),
            "drafts_per_step": _per_step(mtp) if accepted else None,
            "counters": mtp["counters"],
        },
    }


def accepted_drafts(timed: Json) -> list[int] | None:
    """Return how many drafts each chunk brought, prefill's 0 first; None if that is not known.

    A step's tokens come in one chunk: the accepted drafts, then one token of its own. But a slow
    client gets several steps in one chunk, so the server's counters have to agree.
    """
    counted, sizes = timed["counters"], [size for _, size in timed["chunks"]]
    if counted is None or sizes[0] != 1 or counted["num_drafts"] != len(sizes) - 1:
        return None
    accepted = [size - 1 for size in sizes]
    # Where the answer's end cuts the last step short, its own token is missing first.
    accepted[-1] += counted["num_accepted_tokens"] - sum(accepted)
    per_step = _per_step(timed)
    whole = per_step * counted["num_drafts"] == counted["num_draft_tokens"]
    if not whole or accepted[-1] < sizes[-1] - 1 or max(accepted) > per_step:
        return None
    return accepted


def _per_step(timed: Json) -> int:
    counted = timed["counters"]
    return counted["num_draft_tokens"] // max(1, counted["num_drafts"]) if counted else 0


def _answer(
    timed: Json, accepted: Sequence[int] | None, pieces: Sequence[list[Piece]]
) -> dict[str, Any]:
    sizes, per_step = [size for _, size in timed["chunks"]], _per_step(timed)
    known: Sequence[int | None] = accepted or [None] * len(sizes)
    so_far = list(accumulate(accepted or []))
    return {
        "seconds": timed["chunks"][-1][0],
        "tokens": len(timed["token_ids"]),
        "steps": [
            {
                "at": round(timed["chunks"][n][0], 6),
                "start": start,
                "tokens": size,
                "accepted": known[n],
                "acceptance": so_far[n] / (n * per_step) if n and accepted else None,
                "pieces": pieces[n],
            }
            for n, (start, size) in enumerate(zip(accumulate([0, *sizes[:-1]]), sizes, strict=True))
        ],
    }


def _single_tokens(base: Json, same: int) -> list[str]:
    """Return the texts of the tokens that both answers share, while the base's came singly."""
    sizes = [size for _, size in base["chunks"]]
    single = next((n for n, size in enumerate(sizes) if size != 1), len(sizes))
    return list(base["texts"][: min(same, single)])


def _split_steps(
    mtp: Json, accepted: Sequence[int] | None, singles: Sequence[str]
) -> list[list[Piece]]:
    """Split each chunk's text into drafts and own token, by what the base said token by token."""
    steps: list[list[Piece]] = []
    start = 0
    for n, ((_, size), text) in enumerate(zip(mtp["chunks"], mtp["texts"], strict=True)):
        tokens = singles[start : start + size]
        start += size
        drafts = accepted[n] if accepted else 0 if size == 1 else None
        if drafts == 0:
            steps.append([(text, "own")])
        elif drafts is not None and drafts >= size:
            steps.append([(text, "draft")])
        elif drafts is not None and len(tokens) == size and "".join(tokens) == text:
            steps.append([("".join(tokens[:drafts]), "draft"), ("".join(tokens[drafts:]), "own")])
        else:
            steps.append([(text, "mixed")])
    return steps


def _mark_difference(steps: Iterable[Sequence[Piece]], shared: int) -> list[list[Piece]]:
    """Mark all text after the first `shared` characters as apart; leave out empty pieces."""
    marked = []
    for pieces in steps:
        found: list[Piece] = []
        for text, kind in pieces:
            found += [(text[:shared], kind), (text[shared:], f"{kind} apart")]
            shared = max(0, shared - len(text))
        marked.append([piece for piece in found if piece[0]])
    return marked
