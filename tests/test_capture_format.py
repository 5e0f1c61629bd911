"""The capture's files: lines survive kills, and broken recordings are named."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from mtp_graft.checkpoint import capture as files
from mtp_graft.checkpoint.capture import CapturedSequence, append_row, read_recorded, read_sequences
from mtp_graft.checkpoint.shards import save_shard
from mtp_graft.errors import GraftError

STREAMS, HIDDEN = 2, 3
RECORDING = "000001.safetensors"


def sequence(number: int, *, start: int = 0, tokens: int = 4) -> CapturedSequence:
    return CapturedSequence(number, f"p{number}", "calibration", 2, tokens, RECORDING, start)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A capture of two sequences of 4 and 3 tokens in one recording."""
    (tmp_path / files.RECORDINGS).mkdir()
    write_recording(tmp_path, torch.arange(7 * STREAMS * HIDDEN).reshape(7, -1).bfloat16())
    return tmp_path


def write_recording(folder: Path, residual: torch.Tensor) -> None:
    ids = torch.arange(len(residual), dtype=torch.int32)
    tensors = {"token_ids": ids, "residual": residual, "targets": ids + 1}
    save_shard(tensors, folder / files.RECORDINGS / RECORDING)


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_line_is_left_out_and_the_next_append_removes_it(tmp_path: Path, kept: int) -> None:
    append_row(tmp_path, sequence(1))
    path = tmp_path / files.INDEX_NAME
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:kept])
    assert read_sequences(tmp_path) == [sequence(1)]
    append_row(tmp_path, sequence(0))
    assert read_sequences(tmp_path) == [sequence(0), sequence(1)], "by number"


@pytest.mark.parametrize("line", ["{", "7", '{"number": 1}'])
def test_a_line_in_the_middle_that_is_no_sequence_is_an_error(tmp_path: Path, line: str) -> None:
    (tmp_path / files.INDEX_NAME).write_text(line + "\n")
    with pytest.raises(GraftError, match=r"index.jsonl:1: not a CapturedSequence"):
        read_sequences(tmp_path)


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(GraftError, match=r"index.jsonl: the disk is full; make room"):
        append_row(tmp_path, sequence(0))


def test_a_sequences_tokens_are_cut_from_its_recording(folder: Path) -> None:
    recorded = read_recorded(folder, sequence(1, start=4, tokens=3), STREAMS)
    assert recorded.token_ids.tolist() == [4, 5, 6]
    assert recorded.targets.tolist() == [5, 6, 7]
    assert recorded.residual.shape == (3, STREAMS, HIDDEN)
    assert recorded.residual[0, 1].tolist() == [27, 28, 29]


def test_values_that_are_not_finite_are_named(folder: Path) -> None:
    residual = torch.zeros(7, STREAMS * HIDDEN).bfloat16()
    residual[5, 2] = float("nan")
    write_recording(folder, residual)
    assert read_recorded(folder, sequence(0), STREAMS)
    with pytest.raises(GraftError, match=r"prompt 'p1': not-finite residual at token 1"):
        read_recorded(folder, sequence(1, start=4, tokens=3), STREAMS)


def test_recordings_that_are_too_short_cut_off_or_of_another_shape_are_errors(folder: Path) -> None:
    with pytest.raises(GraftError, match=r"2 tokens from token 5 on, expected 4"):
        read_recorded(folder, sequence(0, start=5), STREAMS)
    with pytest.raises(GraftError, match=r"residual of shape \[4, 6\], expected"):
        read_recorded(folder, sequence(0), streams=4)
    path = folder / files.RECORDINGS / RECORDING
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(GraftError, match=r"000001\.safetensors: not a readable safetensors file"):
        read_recorded(folder, sequence(0), STREAMS)
