"""The capture on disk: what the base did on every prompt, in the order the server computed it.

A capture folder holds `recordings/NNNNNN.safetensors`, one per forward pass of the server, each
with whole sequences one after the other, and `index.jsonl`, one line per sequence saying where it
lies. Lines are appended as sequences finish: an index is always a valid, perhaps shorter, capture.
A recording that no line names belongs to a pass whose client was killed, and may be removed.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mtp_graft.checkpoint.shards import open_shard
from mtp_graft.errors import GraftError

INDEX_NAME = "index.jsonl"
RECORDINGS = "recordings"


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


@dataclass(frozen=True)
class Recorded:
    """What the base computed on one sequence of T tokens, S streams, hidden size D."""

    token_ids: Tensor  # int64 [T]
    residual: Tensor  # bfloat16 [T, S, D], before hc_head and the final norm
    targets: Tensor  # int64 [T], the base's argmax after each position


def append_sequence(folder: Path, sequence: CapturedSequence) -> None:
    """Add one line to the index and sync it."""
    with (folder / INDEX_NAME).open("a") as index:
        index.write(json.dumps(asdict(sequence), ensure_ascii=False) + "\n")
        index.flush()
        os.fsync(index.fileno())


def read_sequences(folder: Path) -> list[CapturedSequence]:
    """Return the sequences of a capture folder, by number; a torn last line is not one of them.

    Raises GraftError for a line in the middle that is no sequence.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    lines.pop()  # what follows the last newline: nothing, or a line whose write was cut off
    sequences = {}
    for number, line in enumerate(lines, start=1):
        try:
            sequence = CapturedSequence(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise GraftError(f"{path}:{number}: not a captured sequence ({error})") from error
        sequences[sequence.number] = sequence
    return [sequences[number] for number in sorted(sequences)]


def read_recorded(folder: Path, sequence: CapturedSequence, streams: int) -> Recorded:
    """Return what was recorded of `sequence`, its residual split into `streams` streams.

    Raises GraftError for a missing or unreadable recording, for one that is too short or of other
    shapes, and for values that are not finite.
    """
    path = folder / RECORDINGS / sequence.recording
    rows = slice(sequence.start, sequence.start + sequence.tokens)
    with open_shard(path) as recording:
        try:
            token_ids, residual, targets = (
                recording.get_slice(name)[rows] for name in ("token_ids", "residual", "targets")
            )
        except SafetensorError as error:
            raise GraftError(f"{path}: {error}; expected a recording of the base") from error
    where = f"{path}: prompt {sequence.id!r}"
    if len(token_ids) != sequence.tokens or len(residual) != sequence.tokens:
        raise GraftError(
            f"{where}: {len(token_ids)} rows at row {sequence.start}, expected {sequence.tokens}; "
            "capture again into an empty folder"
        )
    if residual.dim() != 2 or residual.shape[1] % streams:
        raise GraftError(
            f"{where}: residual of shape {list(residual.shape)}, expected [tokens, a multiple of "
            f"{streams} streams]"
        )
    if not torch.isfinite(residual).all():
        row = int((~torch.isfinite(residual)).any(dim=1).nonzero()[0])
        raise GraftError(
            f"{where}: not-finite residual at token {row}; the base itself went wrong there: "
            "check its checkpoint and kernels, then capture again"
        )
    return Recorded(token_ids.long(), residual.unflatten(1, (streams, -1)), targets.long())


def iterate_capture(
    folder: Path, streams: int, split: str | None = None
) -> Iterator[tuple[CapturedSequence, Recorded]]:
    """Yield every sequence of `split` (or of all) with what was recorded of it, by number.

    Raises GraftError if there is none.
    """
    wanted = [s for s in read_sequences(folder) if split in (None, s.split)]
    if not wanted:
        raise GraftError(
            f"{folder}: no captured sequences{'' if split is None else f' of split {split!r}'}; "
            "run `mtp-graft capture` first"
        )
    for sequence in wanted:
        yield sequence, read_recorded(folder, sequence, streams)
