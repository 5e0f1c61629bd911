"""Recorded answers, chunk by chunk: which tokens were accepted drafts, and where texts part.

A step that verifies drafts gives the accepted ones, then one token of the model's own; its tokens
come in one chunk. A slow client gets several steps in one chunk, though, so chunks are believed
only where the server's counters of that request agree with them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from mtp_graft.bench.decode import Timed, shared_length


@dataclass(frozen=True)
class Account:
    """The accepted drafts of every chunk of an answer, the first (of prefill) included."""

    accepted: tuple[int, ...]  # as the server counts: of the last, also what the limit cut off
    drafts_per_step: int

    @property
    def running(self) -> list[float]:
        """Return the acceptance so far after every chunk but the first, 0..1."""
        sums = list(accumulate(self.accepted))[1:]
        return [done / (self.drafts_per_step * step) for step, done in enumerate(sums, start=1)]


@dataclass(frozen=True)
class Recording:
    """One prompt's answers in the recorded rounds."""

    id: str
    base: Timed | None  # None in run folders from before it was kept
    mtp: Timed

    @cached_property
    def account(self) -> Account | None:
        """Return what every step with MTP accepted; None if chunks and counters disagree."""
        return account(self.mtp)

    @cached_property
    def divergence(self) -> int | None:
        """Return the first position at which the answers' tokens differ; None if they do not."""
        if self.base is None or self.base.completion.token_ids == self.mtp.completion.token_ids:
            return None
        return shared_length(self.base.completion.token_ids, self.mtp.completion.token_ids)

    @cached_property
    def shared_chars(self) -> int:
        """Return how long the answers' texts are the same."""
        assert self.base is not None, "a single text is compared with nothing"
        return shared_length(*("".join(t.completion.texts) for t in (self.base, self.mtp)))


def read_recordings(recorded: Mapping[str, Any] | None) -> list[Recording]:
    """Return every prompt's answers; none if those with MTP were not kept."""
    if recorded is None or recorded["mtp"] is None:
        return []
    mtp = [Timed.from_dict(timed) for timed in recorded["mtp"]["timed"]]
    base: Sequence[Timed | None] = [None] * len(mtp)
    if recorded["base"] is not None:
        base = [Timed.from_dict(timed) for timed in recorded["base"]["timed"]]
    return [Recording(*found) for found in zip(recorded["prompts"], base, mtp, strict=True)]


def account(timed: Timed) -> Account | None:
    """Return what was accepted in every chunk; None where chunks and counters disagree."""
    counted, sizes = timed.counters, [size for _, size in timed.completion.chunks]
    if counted is None or sizes[0] != 1 or counted.num_drafts != len(sizes) - 1:
        return None
    if not counted.num_drafts:
        return Account((0,), 0)
    per_step, rest = divmod(counted.num_draft_tokens, counted.num_drafts)
    accepted = [size - 1 for size in sizes]
    # The end of the answer cuts the last step short: its own token first, then accepted drafts.
    accepted[-1] += counted.num_accepted_tokens - sum(accepted)
    if rest or accepted[-1] < sizes[-1] - 1 or max(accepted) > per_step:
        return None
    return Account(tuple(accepted), per_step)


@dataclass(frozen=True)
class Piece:
    """Some text of a step: `draft` (accepted), `own`, or `mixed` where that cannot be told."""

    text: str
    kind: str
    shared: bool  # with the other answer, up to here


def base_pieces(recording: Recording) -> list[list[Piece]]:
    """Return the base's text, chunk by chunk, parted where the answers' texts do."""
    assert recording.base is not None, "asked for where there is one"
    plain = [[(text, "own")] for text in recording.base.completion.texts]
    return _parted(plain, recording.shared_chars)


def mtp_pieces(recording: Recording) -> list[list[Piece]]:
    """Return the text with MTP, chunk by chunk: accepted drafts, then the step's own token.

    What each token of a chunk says is known from the base, which gave the same tokens singly.
    """
    done, known, start = recording.mtp.completion, _single_tokens(recording), 0
    accepted = recording.account.accepted if recording.account else [None] * len(done.chunks)
    chunks: list[list[tuple[str, str]]] = []
    for (_, size), text, drafts in zip(done.chunks, done.texts, accepted, strict=True):
        texts = known[start : start + size]
        start += size
        if drafts is not None and (drafts == 0 or drafts >= size):
            chunks.append([(text, "draft" if drafts else "own")])
        elif drafts is not None and len(texts) == size and "".join(texts) == text:
            parts = (("".join(texts[:drafts]), "draft"), ("".join(texts[drafts:]), "own"))
            chunks.append([part for part in parts if part[0]])
        else:
            chunks.append([(text, "own" if size == 1 else "mixed")])
    shared = 0 if recording.base is None else recording.shared_chars
    return _parted(chunks, shared)


def _single_tokens(recording: Recording) -> list[str]:
    """Return the texts of the tokens that base and MTP share, as long as the base's came singly."""
    if recording.base is None:
        return []
    done = recording.base.completion
    shared = len(done.token_ids) if recording.divergence is None else recording.divergence
    single = next((n for n, (_, size) in enumerate(done.chunks) if size != 1), len(done.chunks))
    return list(done.texts[: min(shared, single)])


def _parted(chunks: Sequence[Sequence[tuple[str, str]]], shared: int) -> list[list[Piece]]:
    """Cut the text after `shared` characters; empty parts are left out."""

    def cut(parts: Sequence[tuple[str, str]], left: int) -> Iterator[Piece]:
        for text, kind in parts:
            if text[:left]:
                yield Piece(text[:left], kind, True)
            if text[left:]:
                yield Piece(text[left:], kind, False)
            left = max(0, left - len(text))

    found, start = [], 0
    for parts in chunks:
        found.append(list(cut(parts, max(0, shared - start))))
        start += sum(len(text) for text, _ in parts)
    return found
