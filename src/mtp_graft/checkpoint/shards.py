"""Safetensors checkpoints on disk: shards, their index, and reading single tensors from them."""

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import lru_cache
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel, NonNegativeInt, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from mtp_graft.checkpoint.files import fetched, read_as, replacing, write_json
from mtp_graft.errors import GraftError, in_words
from mtp_graft.quant import meta

INDEX_NAME = "model.safetensors.index.json"

_NAMES: dict[str, str] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, own) for name, own in _NAMES.items()}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: Bytes of one read, and how many of them are in flight: one alone does not keep a disk busy.
_READ_BYTES, _READS = 2**24, 8
_MOST_HEADER_BYTES = 10**8  # by the format
Tensors = Mapping[str, Tensor]


class _Index(BaseModel):
    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None


class _Entry(TypedDict):
    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: tuple[int, int]  # of its values, from the end of the header


_HEADER = TypeAdapter(dict[str, _Entry | dict[str, str] | None])  # the others: __metadata__


class Shard(AbstractContextManager["Shard"]):
    """An open safetensors file: `meta` are its tensors without values, which are read when asked.

    They are not mapped: a cold file would be read a page fault at a time. Raises GraftError for a
    file that is missing, cut off or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise GraftError(f"{path}: not found; expected a safetensors file, fetch it again")
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._starts: dict[str, int] = {}  # where in the file a tensor's values start
        self.meta: dict[str, Tensor] = {}
        try:
            self._read_header()
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:  # of torch
            self._file.close()
            found = f"{path}: not a readable safetensors file ({in_words(error)})"
            raise GraftError(f"{found}; if it was cut off, fetch or capture again") from error

    def _read_header(self) -> None:
        first = fetched(self._file.read(32))
        size, begin = os.fstat(self._file.fileno()).st_size, 8 + int.from_bytes(first[:8], "little")
        if not 8 < begin <= min(size, 8 + _MOST_HEADER_BYTES):
            raise ValueError(f"a header of {begin - 8:,} bytes in a file of {size:,}")
        text, start = os.pread(self._file.fileno(), begin - 8, 8), 0
        entries: dict[str, Any] = _HEADER.validate_json(text, strict=True)
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if (dtype := entry["dtype"]) not in _DTYPES:
                raise ValueError(f"{name} is {dtype}, expected one of {', '.join(_DTYPES)}")
            tensor = meta(tuple(entry["shape"]), dtype=_DTYPES[dtype])
            self.meta[name], self._starts[name] = tensor, begin + start
            expected = start, start + tensor.nbytes
            if (found := entry["data_offsets"]) != expected:
                raise ValueError(f"{name} is at {found}, expected {expected} by its shape")
            start = expected[1]
        if begin + start != size:
            raise ValueError(f"{size:,} bytes, expected {begin + start:,} by its header")

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def read(
        self, names: Iterable[str], rows: slice = slice(None), *, pinned: bool = False
    ) -> dict[str, Tensor]:
        """Read tensors, or the same `rows` of each, perhaps into `pinned` memory; or GraftError."""
        found: dict[str, Tensor] = {}
        reads: list[tuple[memoryview, int]] = []  # where to, and from which byte of the file
        for name in names:
            if (part := self.meta.get(name)) is None:
                raise GraftError(f"{self._path}: has no tensor {name}; fetch or capture again")
            part = part[rows] if part.dim() else part
            start = self._starts[name] + int(part.storage_offset()) * part.element_size()
            values = torch.empty(part.nbytes, dtype=torch.uint8, pin_memory=pinned)
            view, steps = values.numpy().data, range(0, part.nbytes, _READ_BYTES)
            reads += [(view[at : at + _READ_BYTES], start + at) for at in steps]
            found[name] = values.view(part.dtype).view(part.shape)
        if len(reads) == 1:  # as of most tensors: a thread would take longer than the read
            _read_at(self._file, *reads[0])
            return found
        with ThreadPoolExecutor(_READS) as pool:  # starts no more threads than there are reads
            list(pool.map(lambda read: _read_at(self._file, *read), reads))
        return found


def _read_at(file: FileIO, view: memoryview, start: int) -> None:
    """Fill `view` from byte `start` of an unbuffered file."""
    while view:
        got = os.preadv(file.fileno(), [view], start)
        if not got:
            raise GraftError(f"{file.name!s}: was cut off while it was read; fetch it again")
        view, start = view[got:], start + got


def read_weight_map(path: Path) -> dict[str, str]:
    """Return an index's tensor name -> shard, whether that is there or not.

    Raises GraftError for a missing or damaged index, and a shard that is no file of the folder.
    """
    at = path.stat() if path.is_file() else None
    return _weight_map(path, at and (at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns))


@lru_cache(maxsize=4)  # a command asks a checkpoint of 100,000 tensors several times
def _weight_map(path: Path, _state: tuple[int, ...] | None) -> dict[str, str]:
    index = read_as(_Index, path, "a safetensors index", "fetch it again")
    for shard, name in {shard: name for name, shard in index.weight_map.items()}.items():
        if Path(shard).name != shard or shard in ("", "..") or "\0" in shard:
            raise GraftError(f"{path}: the shard of {name} is {shard!r}, expected a file's name")
    return index.weight_map


def read_index(folder: Path, prefix: str = "") -> dict[str, str]:
    """Return the same of names that start with `prefix`; GraftError also for an absent shard."""
    listed = read_weight_map(folder / INDEX_NAME)
    weight_map = {n: listed[n] for n in listed if n.startswith(prefix)} if prefix else listed
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise GraftError(f"{folder / shard}: not found, but {INDEX_NAME} lists it; fetch again")
    return weight_map


def _by_shard(names: Iterable[str], shard_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Return shard -> those names that it has, shards in alphabetical order."""
    located = groupby(sorted(names, key=shard_of.__getitem__), shard_of.__getitem__)
    return {shard: [*of_shard] for shard, of_shard in located}


def read_meta(folder: Path, prefix: str = "", *, complete: bool = False) -> dict[str, Tensor]:
    """Return meta tensors (shape and dtype, no values) of the names that start with `prefix`.

    Raises GraftError for broken shards, for a tensor that is listed and not there, and, with
    `complete`, for one that is there and not listed.
    """
    weight_map, found = read_index(folder, prefix), dict[str, Tensor]()
    for shard, listed in _by_shard(weight_map, weight_map).items():
        with Shard(folder / shard) as file:
            held = {name for name in file.meta if name.startswith(prefix)}
            found |= file.meta
        if missing := sorted(set(listed) - held):
            lacks = f"has no {missing[0]} ({len(missing)} missing in all)"
            raise GraftError(f"{folder / shard}: {lacks}, but {INDEX_NAME} lists it; fetch again")
        if complete and (unlisted := sorted(held - set(listed))):
            lacks = f"does not list {unlisted[0]} ({len(unlisted)} in all), which {shard} holds"
            raise GraftError(f"{folder / INDEX_NAME}: {lacks}; fetch the index again")
    return {name: found[name] for name in weight_map}


def load_tensors(
    folder: Path, names: list[str] | None = None, *, pinned: bool = False
) -> dict[str, Tensor]:
    """Load tensors by name (all of them by default) from the checkpoint in `folder`."""
    weight_map = read_weight_map(folder / INDEX_NAME)
    wanted = list(weight_map) if names is None else names
    if missing := [name for name in wanted if name not in weight_map]:
        raise GraftError(f"{folder}: no tensor {missing[0]} ({len(missing)} missing in all)")
    loaded: dict[str, Tensor] = {}
    for shard, held in _by_shard(wanted, weight_map).items():
        with Shard(folder / shard) as file:
            loaded |= file.read(held, pinned=pinned)
    return {name: loaded[name] for name in wanted}


def save_shard(tensors: Tensors, path: Path) -> None:
    """Write one file with the bytes that safetensors writes, as `files.replacing` does."""
    stream_shard(tensors, tensors.items(), path)


def stream_shard(layout: Tensors, tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write the same one tensor at a time, in any order: those of `layout`, which may be meta."""
    with replacing(path) as file:
        starts = _write_header(layout, file)
        for name, tensor in tensors:
            expected = layout[name]
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
            file.seek(starts.pop(name))
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        assert not starts, f"{min(starts)}: laid out, but never given"


def _write_header(layout: Tensors, file: BinaryIO) -> dict[str, int]:
    """Write a safetensors header; return where in the file each tensor's values start."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order, starts, end = [*_DTYPES.values()], dict[str, int](), 0
    # Wide dtypes first, as the format's own writer does it: every value is aligned.
    for name in sorted(layout, key=lambda name: (order.index(layout[name].dtype), name)):
        starts[name], end = end, end + layout[name].nbytes
        dtype, shape = _DTYPE_NAMES[layout[name].dtype], list(layout[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def write_index(
    weights: Mapping[str, str], size: int, folder: Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write the index of a checkpoint; call it last, when every shard is in place."""
    known = {**(metadata or {}), "total_size": size}
    write_json({"metadata": known, "weight_map": dict(weights)}, folder / INDEX_NAME)
