"""Checkpoints written and read back, and what is said about broken ones."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_graft.checkpoint import shards
from mtp_graft.errors import GraftError

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 1000


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Shards of at most 1,000 bytes: a and b (1,000), big (1,600), c (1,000), d and e (208)."""
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
    shards.save_checkpoint(tensors, tmp_path, MAX_SHARD_BYTES)
    return tmp_path


def same(ours: Tensor, other: Tensor) -> bool:
    as_bytes = [t.contiguous().view(torch.uint8) for t in (ours, other)]
    return (
        ours.dtype == other.dtype
        and ours.shape == other.shape
        and torch.equal(as_bytes[0], as_bytes[1])
    )


def test_shards_are_filled_in_order_up_to_the_limit(checkpoint: Path) -> None:
    held = []
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            held.append((path.name, sorted(file.keys())))
    assert held == [
        ("model-00001-of-00004.safetensors", ["a", "b"]),
        ("model-00002-of-00004.safetensors", ["big"]),
        ("model-00003-of-00004.safetensors", ["c"]),
        ("model-00004-of-00004.safetensors", ["d", "e"]),
    ]
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    assert weight_map == {name: shard for shard, names in held for name in names}
    assert shards.read_index(checkpoint) == weight_map


def test_total_size_is_that_of_the_values(checkpoint: Path) -> None:
    metadata = json.loads((checkpoint / INDEX).read_text())["metadata"]
    assert metadata == {"total_size": 400 + 600 + 1600 + 1000 + 100 + 108}


def test_tensors_read_back_as_they_were(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    loaded = shards.load_tensors(checkpoint)
    assert list(loaded) == list(tensors)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


def test_only_the_tensors_asked_for_are_read_in_that_order(
    checkpoint: Path, tensors: dict[str, Tensor]
) -> None:
    (checkpoint / "model-00002-of-00004.safetensors").write_bytes(b"unreadable")
    loaded = shards.load_tensors(checkpoint, ["e", "a"])
    assert list(loaded) == ["e", "a"]
    assert all(same(tensor, tensors[name]) for name, tensor in loaded.items())


def test_temporary_files_are_gone_and_the_same_tensors_give_the_same_bytes(
    checkpoint: Path, tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    again = tmp_path_factory.mktemp("again")
    shards.save_checkpoint(tensors, again, MAX_SHARD_BYTES)
    files = sorted(path.name for path in checkpoint.iterdir())
    assert len(files) == 5 and not any("tmp" in name for name in files)
    for name in files:
        assert (checkpoint / name).read_bytes() == (again / name).read_bytes()


def test_a_shards_bytes_do_not_depend_on_the_order_it_is_given(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    shards.save_shard(tensors, tmp_path / "one.safetensors")
    shards.save_shard(dict(reversed(tensors.items())), tmp_path / "two.safetensors")
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize("rows", [slice(None), slice(3, 90)])
def test_large_tensors_are_read_in_parts(
    rows: slice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.randn(100, 33), "b": torch.arange(100), "c": torch.zeros(100, 0)}
    shards.save_shard(tensors, tmp_path / "one.safetensors")
    monkeypatch.setattr(shards, "_READ_BYTES", 1000)  # which rows lie across
    found = shards.read_tensors(tmp_path / "one.safetensors", tensors, rows)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor[rows])


def test_a_file_cut_off_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.safetensors"
    shards.save_shard({"a": torch.zeros(100)}, path)
    checked = shards.open_shard

    @contextmanager
    def cut_after_check(path: Path) -> Iterator[object]:
        with checked(path) as tensors:
            yield tensors
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(shards, "open_shard", cut_after_check)
    with pytest.raises(GraftError, match=r"one\.safetensors: was cut off while it was read"):
        shards.read_tensors(path, ["a"])


def test_what_can_be_computed_again_need_not_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(shards.os, "fsync", synced.append)
    shards.save_shard({"a": torch.zeros(3)}, tmp_path / "one", sync=False)
    assert not synced
    shards.save_shard({"a": torch.zeros(3)}, tmp_path / "two")
    assert len(synced) == 1
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_failed_write_leaves_the_old_file(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint / "model-00001-of-00004.safetensors"
    before = path.read_bytes()

    def fail_half_way(_tensors: object, target: Path, **_options: object) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(shards, "save_file", fail_half_way)
    with pytest.raises(OSError, match="no space"):
        shards.save_shard({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before


def test_index_keeps_the_metadata_it_is_given(tmp_path: Path) -> None:
    shards.write_index({"a": "one.safetensors"}, 7, tmp_path, {"format": "pt", "total_size": 3})
    content = json.loads((tmp_path / INDEX).read_text())
    assert content == {
        "metadata": {"format": "pt", "total_size": 7},
        "weight_map": {"a": "one.safetensors"},
    }


def truncate(folder: Path) -> None:
    shard = folder / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def truncate_header(folder: Path) -> None:
    shard = folder / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:20])


def empty(folder: Path) -> None:
    (folder / "model-00001-of-00004.safetensors").write_bytes(b"")


def remove_shard(folder: Path) -> None:
    (folder / "model-00001-of-00004.safetensors").unlink()


def remove_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def garble_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {')


def drop_weight_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"metadata": {}}')


def list_as_index(folder: Path) -> None:
    (folder / INDEX).write_text('["a"]')


def number_a_shard(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": 1}}')


def name_a_stranger(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["stranger"] = "model-00001-of-00004.safetensors"
    (folder / INDEX).write_text(json.dumps(content))


SHARD = r"model-00001-of-00004\.safetensors: "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, SHARD + "not a readable safetensors file"),
        (truncate_header, SHARD + "not a readable safetensors file"),
        (empty, SHARD + "not a readable safetensors file"),
        (remove_shard, SHARD + "not found, but model.safetensors.index.json lists it"),
        (remove_index, r"index\.json: not found; expected a safetensors index"),
        (garble_index, r"index\.json: not a safetensors index"),
        (drop_weight_map, r"index\.json: not a safetensors index"),
        (list_as_index, r"index\.json: not a safetensors index"),
        (number_a_shard, r"index\.json: the shard of a is 1, expected a file's name"),
        (name_a_stranger, SHARD + ".*has no tensor .*stranger"),
    ],
)
def test_a_broken_checkpoint_is_one_error_that_names_the_file(
    checkpoint: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(checkpoint)
    with pytest.raises(GraftError, match=message):
        shards.load_tensors(checkpoint)


def test_asking_for_unknown_tensors_names_the_first_and_counts_them(checkpoint: Path) -> None:
    with pytest.raises(GraftError, match=r"no tensor x \(2 missing in all\)"):
        shards.load_tensors(checkpoint, ["a", "x", "y"])


# Streaming, headers, and full disks


def test_a_streamed_shard_has_the_bytes_of_a_saved_one(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors |= {
        "i64": torch.arange(3),
        "i32": torch.arange(3, dtype=torch.int32),
        "f64": torch.zeros(3, dtype=torch.float64),
        "f16": torch.zeros(3, dtype=torch.float16),
        "i16": torch.zeros(3, dtype=torch.int16),
        "i8": torch.zeros(3, dtype=torch.int8),
        "bool": torch.zeros(3, dtype=torch.bool),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "\u00e9": torch.zeros(1),
    }
    shards.save_shard(tensors, tmp_path / "saved")
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    shards.stream_shard(layout, reversed(list(tensors.items())), tmp_path / "streamed")
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "saved").read_bytes()


def test_meta_tensors_have_the_shapes_and_dtypes_of_what_is_stored(
    checkpoint: Path, tensors: dict[str, Tensor]
) -> None:
    wanted = {"e": "model-00004-of-00004.safetensors", "a": "model-00001-of-00004.safetensors"}
    meta = shards.read_meta(checkpoint, wanted)
    assert list(meta) == ["e", "a"] and all(tensor.is_meta for tensor in meta.values())
    for name, tensor in meta.items():
        assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype)


def test_an_index_of_one_prefix_needs_only_its_shards(checkpoint: Path) -> None:
    (checkpoint / "model-00003-of-00004.safetensors").unlink()
    assert shards.check_index(checkpoint, "b") == {
        name: shard for name, shard in shards.read_index(checkpoint, "b").items()
    }
    assert set(shards.read_index(checkpoint, "b")) == {"b", "big"}
    with pytest.raises(GraftError, match=r"00003-of-00004.*not found"):
        shards.check_index(checkpoint)


def test_index_and_shards_are_compared_both_ways(checkpoint: Path) -> None:
    assert shards.check_index(checkpoint) == shards.read_index(checkpoint)
    content = json.loads((checkpoint / INDEX).read_text())
    shard = content["weight_map"].pop("b")
    (checkpoint / INDEX).write_text(json.dumps(content))
    with pytest.raises(GraftError, match=rf"index\.json: does not list b \(1 in all\).*{shard}"):
        shards.check_index(checkpoint)
    content["weight_map"] |= {"b": shard, "x": shard, "y": shard}
    (checkpoint / INDEX).write_text(json.dumps(content))
    with pytest.raises(GraftError, match=rf"{shard}: has no x \(2 missing in all\)"):
        shards.check_index(checkpoint)


@pytest.mark.parametrize("how", ["save", "stream", "json"])
def test_a_full_disk_is_one_error_that_names_file_and_size(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:  # as seen on a full tmpfs
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", fail)  # it does not write through a link
    path = tmp_path / "out"
    (tmp_path / ".out.tmp").symlink_to("/dev/full")  # every write fails as on a full disk
    tensors = {"a": torch.zeros(1_000_000)}
    with pytest.raises(GraftError, match=r"out: the disk is full; [\d,]+ bytes"):
        if how == "save":
            shards.save_shard(tensors, path)
        elif how == "stream":
            shards.stream_shard(tensors, iter(tensors.items()), path)
        else:
            shards.write_json({"a": 1}, path)
    assert list(tmp_path.iterdir()) == []
