"""The capture on disk: what the base did on every prompt, in the order the server computed it.

A capture folder holds `recordings/NNNNNN.safetensors`, one per forward pass of the server, each
with whole sequences one after the other, and `index.jsonl`, one line per sequence saying where it
lies: an index is always a valid, perhaps shorter, capture. A recording that no line names belongs
to a pass whose client was killed. `texts.jsonl` holds the sequences, from before they are recorded.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mtp_graft.checkpoint.files import full_disk_is_an_error
from mtp_graft.checkpoint.shards import Shard
from mtp_graft.errors import GraftError, translated

INDEX_NAME = "index.jsonl"
TEXTS_NAME = "texts.jsonl"
RECORDINGS = "recordings"
#: A server with this variable in its environment records into the capture folder it names,
RECORD_VARIABLE = "MTP_GRAFT_RECORD"
#: and of the layers in this one, such as 40,41,42, the taps as well,
TAPS_VARIABLE = "MTP_GRAFT_RECORD_TAPS"
#: while a file of this name is there. What it cannot write, it says in its log, and
SWITCH_NAME = "recording-on"
#: it removes this file, for which a full disk has room.
INTACT_NAME = "recording-intact"


@dataclass(frozen=True)
class FinishedText:
    """A prompt and its greedy continuation, the end token included, as token ids."""

    number: int  # of the prompt, in the order of the calibration set
    id: str
    split: str  # "calibration" or "evaluation"
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the whole sequence."""
        return self.prompt + self.continuation


@dataclass(frozen=True)
class CapturedSequence:
    """Where one finished sequence (prompt and greedy continuation) was recorded."""

    number: int  # of the prompt, in the order of the calibration set
    id: str
    split: str  # "calibration" or "evaluation"
    prompt_tokens: int
    tokens: int  # prompt and continuation
    recording: str  # file name under recordings/
    start: int  # first row in it

    @property
    def calibration_tokens(self) -> int:
        """Return how many of its tokens calibrate the head, which drafts token i + 2 after i."""
        return max(0, self.tokens - 2)


@dataclass(frozen=True)
class Recorded:
    """What the base computed on one sequence of T tokens, S streams, hidden size D."""

    token_ids: Tensor  # int64 [T]
    residual: Tensor  # bfloat16 [T, S, D], before hc_head and the final norm
    targets: Tensor  # int64 [T], the base's argmax after each position
    taps: Tensor | None = None  # bfloat16 [T, L, D], if recorded: means over S after L layers


def append_row(folder: Path, row: FinishedText | CapturedSequence) -> None:
    """Add a line to texts or index and sync it, GraftError if not; a torn one is cut off first."""
    path = folder / (TEXTS_NAME if isinstance(row, FinishedText) else INDEX_NAME)
    line = json.dumps(asdict(row), ensure_ascii=False).encode() + b"\n"
    with full_disk_is_an_error(path), path.open("ab+") as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_texts(folder: Path) -> list[FinishedText]:
    """Return a capture's texts by number; a torn last line is left out, GraftError for others."""
    return _read_rows(folder / TEXTS_NAME, FinishedText)


def read_sequences(folder: Path) -> list[CapturedSequence]:
    """Return a capture's sequences by number; a torn last line is left out likewise."""
    return _read_rows(folder / INDEX_NAME, CapturedSequence)


Row = TypeVar("Row", FinishedText, CapturedSequence)


def _read_rows(path: Path, kind: type[Row]) -> list[Row]:
    if not path.exists():
        return []
    rows: dict[int, Row] = {}
    validate = TypeAdapter(kind).validate_json
    # What follows the last newline is nothing, or a line whose write was cut off.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        with translated(f"{path}:{number}: not a {kind.__name__}", ValidationError):
            row = validate(line)
        rows[row.number] = row
    return [rows[number] for number in sorted(rows)]


def read_recorded(
    folder: Path, sequence: CapturedSequence, streams: int, device: torch.device | str = "cpu"
) -> Recorded:
    """Return what was recorded of `sequence`: residual, in so many streams, and taps on `device`.

    Raises GraftError for a recording that is missing, cut off, of other shapes or not finite.
    """
    path = folder / RECORDINGS / sequence.recording
    tokens = slice(sequence.start, sequence.start + sequence.tokens)
    pinned = torch.device(device).type == "cuda"
    with Shard(path) as shard:
        states = ["residual", *({"taps"} & shard.meta.keys())]
        found = shard.read(("token_ids", "targets", *states), tokens, pinned=pinned)
    token_ids, targets = found["token_ids"].long(), found["targets"].long()
    residual, *taps = (found[name].to(device, non_blocking=pinned) for name in states)
    if problem := _problem(sequence, token_ids, residual, taps, streams):
        raise GraftError(f"{path}: prompt {sequence.id!r}: {problem}; capture again")
    residual = residual.unflatten(1, (streams, -1))
    by_layer = (each.unflatten(1, (-1, residual.shape[2])) for each in taps)
    return Recorded(token_ids, residual, targets, *by_layer)


def _problem(
    sequence: CapturedSequence, token_ids: Tensor, residual: Tensor, taps: list[Tensor], parts: int
) -> str | None:
    if {len(token_ids), len(residual), *map(len, taps)} != {sequence.tokens}:
        return f"{len(token_ids)} tokens from token {sequence.start} on, expected {sequence.tokens}"
    for name, state in zip(("residual", "taps"), (residual, *taps), strict=False):
        if state.dim() != 2 or state.shape[1] % parts:
            return f"{name} of shape {list(state.shape)}, expected [tokens, a multiple of {parts}]"
        if len(bad := torch.isfinite(state).all(dim=1).logical_not().nonzero()):
            where = f"not-finite {name} at token {int(bad[0])}"
            return f"{where}: check the base's checkpoint and kernels"
        parts = residual.shape[1] // parts  # of taps, a layer's hidden size
    return None
