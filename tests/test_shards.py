"""A checkpoint's and a capture's files: read back, huge, torn, and what is said of broken ones."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from mtp_graft.checkpoint import capture as files
from mtp_graft.checkpoint import shards
from mtp_graft.checkpoint.capture import CapturedSequence, append_row, read_recorded, read_sequences
from mtp_graft.checkpoint.shards import save_shard
from mtp_graft.errors import GraftError
from quantized import edit_json

INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(10, 20).bfloat16(),
        "b": torch.randn(150, 4).to(torch.float8_e4m3fn),
        "big": torch.randn(400),
        "c": torch.randn(25, 10).T,  # not contiguous
        "d": torch.arange(100, dtype=torch.int8).view(torch.float8_e8m0fnu),
        "e": torch.arange(108, dtype=torch.uint8),
    }


@pytest.fixture
def checkpoint(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    """Three shards: a and b, big, the rest."""
    names, weight_map = list(tensors), {}
    for shard, held in ((FIRST, names[:2]), (SECOND, names[2:3]), (THIRD, names[3:])):
        shards.save_shard({name: tensors[name] for name in held}, tmp_path / shard)
        weight_map |= dict.fromkeys(held, shard)
    shards.write_index(weight_map, sum(t.nbytes for t in tensors.values()), tmp_path)
    return tmp_path


def test_tensors_read_back_as_they_were(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    loaded = shards.load_tensors(checkpoint)
    assert list(loaded) == list(tensors)
    assert_close(loaded, tensors, rtol=0, atol=0)
    meta = shards.read_meta(checkpoint, complete=True)
    found, stored = ({n: (t.shape, t.dtype) for n, t in of.items()} for of in (meta, tensors))
    assert found == stored
    assert len(list(checkpoint.iterdir())) == 4, "no temporary file is left"
    # Only the tensors asked for are read, in that order.
    (checkpoint / SECOND).write_bytes(b"unreadable")
    loaded = shards.load_tensors(checkpoint, ["e", "a"])
    assert list(loaded) == ["e", "a"]
    assert_close(loaded, {name: tensors[name] for name in loaded}, rtol=0, atol=0)


def test_a_shard_is_as_safetensors_writes_it(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint16)
    tensors |= {str(dtype): torch.zeros(3, dtype=dtype) for dtype in (*integers, torch.uint64)}
    tensors |= {"f64": torch.zeros(3).double(), "f16": torch.zeros(3).half()}
    tensors |= {"bool": torch.zeros(3).bool(), "e5m2": torch.zeros(3).to(torch.float8_e5m2)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "\u00e9": torch.zeros(1)}
    items = list(reversed(tensors.items()))
    expected = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(expected, tmp_path / "theirs", metadata={"format": "pt"})
    shards.save_shard(dict(items), tmp_path / "saved")
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    shards.stream_shard(layout, iter(items), tmp_path / "streamed")
    for name in ("saved", "streamed"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_rows_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(100, 33), "b": torch.arange(100), "c": torch.zeros(100, 0)}
    shards.save_shard(tensors, tmp_path / "one.safetensors")
    monkeypatch.setattr(shards, "_READ_BYTES", 1000)  # which rows lie across
    with shards.Shard(tmp_path / "one.safetensors") as shard:
        found = shard.read(tensors, slice(3, 90))
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor[3:90])


def test_a_file_cut_off_while_it_is_read_is_an_error(checkpoint: Path) -> None:
    with shards.Shard(checkpoint / FIRST) as shard:
        (checkpoint / FIRST).write_bytes((checkpoint / FIRST).read_bytes()[:-1])
        with pytest.raises(GraftError, match=rf"{FIRST}: was cut off while it was read"):
            shard.read(["a", "b"])


def test_the_header_of_a_shard_larger_than_memory_is_read(tmp_path: Path) -> None:
    size = 38 * 10**9  # of the published base
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / FIRST).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(size - 3, 1)
        file.write(b"end")
    shards.write_index({"a": FIRST}, size, tmp_path)
    assert shards.read_meta(tmp_path)["a"].shape == (size,)
    with shards.Shard(tmp_path / FIRST) as shard:
        last = shard.read(["a"], slice(size - 4, size))["a"]
    assert bytes(last.tolist()) == b"\0end"


def entry(**other: object) -> Callable[[Path], object]:
    entry = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8], **other}
    text = json.dumps({"a": entry}).encode()
    return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"expected [\d,]+ by its header"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "a header of .* in a file of 20"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
        (entry(dtype="F4", shape=[16]), "a is F4, expected one of"),
        (entry(shape=[2**62, 2**62]), "not a readable safetensors file"),
        (entry(data_offsets=[0, 4]), r"a is at \(0, 4\), expected \(0, 8\)"),
        (lambda path: path.unlink(), "not found; expected a safetensors file"),
    ],
)
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(checkpoint / FIRST)
    with pytest.raises(GraftError, match=rf"{FIRST}: .*{message}"):
        shards.load_tensors(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not found; expected a safetensors index"),
        (b'{"weight_map": {', "not a safetensors index"),
        (b'{"metadata": {}}', "weight_map: field required"),
        (b'{"weight_map": {"a": "../x"}}', "the shard of a is '../x', expected a file's name"),
    ],
)
def test_a_broken_index_is_one_error(checkpoint: Path, text: bytes | None, message: str) -> None:
    (checkpoint / INDEX).unlink()
    if text is not None:
        (checkpoint / INDEX).write_bytes(text)
    with pytest.raises(GraftError, match=rf"index\.json: .*{message}"):
        shards.load_tensors(checkpoint)


def test_asking_for_unknown_tensors_names_the_first_and_counts_them(checkpoint: Path) -> None:
    edit_json(checkpoint / INDEX, lambda content: content.update(metadata=None))  # is no error
    with pytest.raises(GraftError, match=r"no tensor x \(2 missing in all\)"):
        shards.load_tensors(checkpoint, ["a", "x", "y"])


def test_an_index_of_one_prefix_needs_only_its_shards(checkpoint: Path) -> None:
    (checkpoint / THIRD).unlink()
    assert set(shards.read_meta(checkpoint, "b", complete=True)) == {"b", "big"}
    with pytest.raises(GraftError, match=rf"{THIRD}: not found"):
        shards.read_meta(checkpoint)


def test_index_and_shards_are_compared_both_ways(checkpoint: Path) -> None:
    edit_json(checkpoint / INDEX, lambda content: content["weight_map"].pop("b"))
    assert len(shards.read_meta(checkpoint)) == 5
    with pytest.raises(GraftError, match=rf"index\.json: does not list b \(1 in all\).*{FIRST}"):
        shards.read_meta(checkpoint, complete=True)
    more = dict.fromkeys("bxy", FIRST)
    edit_json(checkpoint / INDEX, lambda content: content["weight_map"].update(more))
    with pytest.raises(GraftError, match=rf"{FIRST}: has no x \(2 missing in all\)"):
        shards.read_meta(checkpoint)


def test_a_failed_write_leaves_the_old_file(checkpoint: Path) -> None:
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(3)
        raise OSError("reading stopped")

    before = (checkpoint / FIRST).read_bytes()
    with pytest.raises(OSError, match="reading stopped"):
        shards.stream_shard({"a": torch.zeros(3)}, failing(), checkpoint / FIRST)
    assert (checkpoint / FIRST).read_bytes() == before
    assert len(list(checkpoint.iterdir())) == 4


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


def write_recording(folder: Path, residual: torch.Tensor, **more: torch.Tensor) -> None:
    ids = torch.arange(len(residual), dtype=torch.int32)
    tensors = {"token_ids": ids, "residual": residual, "targets": ids + 1, **more}
    save_shard(tensors, folder / files.RECORDINGS / RECORDING)


@pytest.mark.parametrize("kept", [1, -1])
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
    assert recorded.taps is None
    taps = torch.arange(7 * 2 * HIDDEN).reshape(7, -1).bfloat16()
    write_recording(folder, torch.zeros(7, STREAMS * HIDDEN).bfloat16(), taps=taps)
    recorded = read_recorded(folder, sequence(1, start=4, tokens=3), STREAMS)
    assert recorded.taps is not None and recorded.taps[0].tolist() == [[24, 25, 26], [27, 28, 29]]


def test_values_that_are_not_finite_are_named(folder: Path) -> None:
    residual = torch.zeros(7, STREAMS * HIDDEN).bfloat16()
    residual[5, 2] = float("nan")
    write_recording(folder, residual)
    assert read_recorded(folder, sequence(0), STREAMS)
    with pytest.raises(GraftError, match=r"prompt 'p1': not-finite residual at token 1"):
        read_recorded(folder, sequence(1, start=4, tokens=3), STREAMS)
    write_recording(folder, torch.zeros_like(residual), taps=residual[:, :HIDDEN])
    with pytest.raises(GraftError, match=r"prompt 'p1': not-finite taps at token 1"):
        read_recorded(folder, sequence(1, start=4, tokens=3), STREAMS)
    write_recording(folder, torch.zeros_like(residual), taps=residual[:, :2])
    with pytest.raises(GraftError, match=r"taps of shape \[4, 2\], expected .* multiple of 3"):
        read_recorded(folder, sequence(0), STREAMS)


def test_recordings_that_are_too_short_cut_off_or_of_another_shape_are_errors(folder: Path) -> None:
    with pytest.raises(GraftError, match=r"2 tokens from token 5 on, expected 4"):
        read_recorded(folder, sequence(0, start=5), STREAMS)
    with pytest.raises(GraftError, match=r"residual of shape \[4, 6\], expected"):
        read_recorded(folder, sequence(0), streams=4)
    path = folder / files.RECORDINGS / RECORDING
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(GraftError, match=r"000001\.safetensors: not a readable safetensors file"):
        read_recorded(folder, sequence(0), STREAMS)
