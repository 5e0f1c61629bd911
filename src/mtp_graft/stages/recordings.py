"""Recordings while they come: the switch that the server looks at, and what it has written."""

import time
from collections.abc import Iterator, Mapping, Sequence
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


def collect(out: Path, texts: Sequence[FinishedText]) -> None:
    """Find `texts`, which have been sent, in new recordings, and enter them in the index.

    Raises NotWritten if the server could not write a recording, and GraftError if nothing was
    written for WRITE_TIMEOUT_S.
    """
    # Prompts that are equal have equal sequences: each recorded copy stands for one of them.
    waiting: dict[tuple[int, ...], list[FinishedText]] = {}
    for text in reversed(texts):
        waiting.setdefault(text.token_ids, []).append(text)
    seen = {sequence.recording for sequence in read_sequences(out)}
    folder, deadline = out / RECORDINGS, time.monotonic() + WRITE_TIMEOUT_S
    while missing := [text for equal in waiting.values() for text in equal]:
        new = {path.name for path in folder.glob("*.safetensors")} - seen
        for name in sorted(new):
            _enter(out, name, waiting)
        seen |= new
        if not (out / INTACT_NAME).exists():
            raise NotWritten(
                f"{folder}: the server could not write what it recorded; make room there if the "
                "disk is full, and run again: what was written is kept"
            )
        if new:
            deadline = time.monotonic() + WRITE_TIMEOUT_S
        elif time.monotonic() > deadline:
            raise GraftError(
                f"{folder}: prompt {missing[0].id!r} ({len(missing)} in all) was sent, but is in "
                "no recording; expected a server that records into this folder, without prefix "
                "caching and chunked prefill; its log may say more"
            )
        else:
            time.sleep(0.01)


def _enter(out: Path, name: str, waiting: Mapping[tuple[int, ...], list[FinishedText]]) -> None:
    """Enter what a recording has of the texts that are waited for, and wait for it no longer."""
    with Shard(out / RECORDINGS / name) as shard:
        recording = shard.read(("token_ids", "starts"))
    token_ids = recording["token_ids"].tolist()
    for start, end in pairwise([*recording["starts"].tolist(), len(token_ids)]):
        equal = waiting.get(tuple(token_ids[start:end]))
        if not equal:
            continue  # another client's request, or ours for the second time
        text = equal.pop()
        size = (len(text.prompt), len(text.token_ids))
        sequence = CapturedSequence(text.number, text.id, text.split, *size, name, start)
        append_sequence(out, sequence)
