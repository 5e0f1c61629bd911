"""Recordings while they come: the switch that the server looks at, and what it has written."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from mtp_graft.checkpoint.capture import (
    INTACT_NAME,
    RECORDINGS,
    SWITCH_NAME,
    CapturedSequence,
    FinishedText,
    append_sequence,
    read_sequences,
)
from mtp_graft.checkpoint.shards import Shard
from mtp_graft.errors import GraftError

#: How long the server may take to write what it computed.
WRITE_TIMEOUT_S = 60.0


class NotWritten(GraftError):
    """The server has computed a recording and could not write it."""


@contextmanager
def switched_on(out: Path) -> Iterator[None]:
    """Let the server record in the block, at whose ends it has no requests."""
    for name in (INTACT_NAME, SWITCH_NAME):
        (out / name).touch()
    try:
        yield
    finally:
        for name in (SWITCH_NAME, INTACT_NAME):
            (out / name).unlink(missing_ok=True)


def remove_strays(out: Path) -> None:
    """Remove recordings that no line of the index names, and unfinished ones."""
    named = {sequence.recording for sequence in read_sequences(out)}
    for path in (out / RECORDINGS).iterdir():
        if path.name not in named:
            path.unlink()


class Collector:
    """Finds texts in new recordings by their tokens, and enters them in the index."""

    def __init__(self, out: Path, texts: Sequence[FinishedText]) -> None:
        self._out = out
        self._seen = {path.name for path in (out / RECORDINGS).iterdir()}
        # Prompts that are equal have equal sequences: each recorded copy stands for one of them.
        self._waiting: dict[tuple[int, ...], list[FinishedText]] = {}
        for text in reversed(texts):
            self._waiting.setdefault(text.token_ids, []).append(text)

    def __len__(self) -> int:
        """Return how many texts have not been found yet."""
        return sum(map(len, self._waiting.values()))

    def collect(self) -> bool:
        """Read the recordings that are new; return whether there were any.

        Raises NotWritten if the server could not write one.
        """
        found = {path.name for path in (self._out / RECORDINGS).glob("*.safetensors")}
        new = sorted(found - self._seen)
        for name in new:
            self._read(name)
        if not (self._out / INTACT_NAME).exists():
            raise NotWritten(
                f"{self._out / RECORDINGS}: the server could not write what it recorded; make room "
                "there if the disk is full, and run again: what was written is kept"
            )
        return bool(new)

    def wait_for(self, texts: Sequence[FinishedText]) -> None:
        """Collect until all of `texts`, which have been sent, are found.

        Raises GraftError if nothing was written for WRITE_TIMEOUT_S.
        """
        deadline = time.monotonic() + WRITE_TIMEOUT_S
        while missing := [t for t in texts if t in self._waiting.get(t.token_ids, ())]:
            if self.collect():
                deadline = time.monotonic() + WRITE_TIMEOUT_S
            elif time.monotonic() > deadline:
                raise GraftError(
                    f"{self._out / RECORDINGS}: prompt {missing[0].id!r} ({len(missing)} in all) "
                    "was sent, but is in no recording; expected a server that records into this "
                    "folder, without prefix caching and chunked prefill; its log may say more"
                )
            else:
                time.sleep(0.01)

    def _read(self, name: str) -> None:
        self._seen.add(name)
        with Shard(self._out / RECORDINGS / name) as recording:
            token_ids = recording.get_tensor("token_ids").tolist()
            starts = recording.get_tensor("starts").tolist()
        for start, end in pairwise([*starts, len(token_ids)]):
            waiting = self._waiting.get(tuple(token_ids[start:end]))
            if not waiting:
                continue  # another client's request, or ours for the second time
            text = waiting.pop()
            size = (len(text.prompt), len(text.token_ids))
            sequence = CapturedSequence(text.number, text.id, text.split, *size, name, start)
            append_sequence(self._out, sequence)
