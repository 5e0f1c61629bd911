"""Safetensors checkpoints on disk: shards, their index, and reading single tensors from them."""

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtp_graft.checkpoint.files import read_weight_map
from mtp_graft.errors import GraftError

INDEX_NAME = "model.safetensors.index.json"

#: The format's names of the dtypes, in the order in which its own writer lays tensors out.
_DTYPES: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: Bytes of one read, and how many of them are in flight: one alone does not keep a disk busy.
_READ_BYTES, _READS = 2**24, 8
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_index(folder: Path, prefix: str = "") -> dict[str, str]:
    """Return the checkpoint's weight map, tensor name to shard file name.

    With a `prefix`, only of the names that start with it; shards of other tensors need not be
    there. Raises GraftError if the index is missing or unreadable, or names a shard that is not
    there.
    """
    path = folder / INDEX_NAME
    listed = read_weight_map(path)
    weight_map = {name: shard for name, shard in listed.items() if name.startswith(prefix)}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise GraftError(f"{folder / shard}: not found, but {path.name} lists it; fetch again")
    return weight_map


def load_tensors(
    folder: Path, names: list[str] | None = None, *, pinned: bool = False
) -> dict[str, Tensor]:
    """Load tensors by name (all of them by default) from the checkpoint in `folder`."""
    # Of an upstream master only the head's shard need be there.
    weight_map = read_index(folder, os.path.commonprefix(names or []))  # noqa: RUF071 - no paths
    wanted = list(weight_map) if names is None else names
    missing = [name for name in wanted if name not in weight_map]
    if missing:
        raise GraftError(f"{folder}: no tensor {missing[0]} ({len(missing)} missing in all)")
    by_shard: dict[str, list[str]] = {}
    for name in wanted:
        by_shard.setdefault(weight_map[name], []).append(name)
    loaded: dict[str, Tensor] = {}
    for shard, shard_names in by_shard.items():
        loaded.update(read_tensors(folder / shard, shard_names, pinned=pinned))
    return {name: loaded[name] for name in wanted}


def read_tensors(
    path: Path, names: Iterable[str], rows: slice = slice(None), *, pinned: bool = False
) -> dict[str, Tensor]:
    """Read tensors of one shard, or the same `rows` of each, into memory of their own.

    Mapping the file, as safetensors does, would count its pages as this process's and read a cold
    file a page fault at a time. `pinned` memory is what a GPU copies from by itself; torch keeps
    and reuses it, so that it need not be mapped anew for every read.
    Raises GraftError for a corrupt shard and a missing tensor.
    """
    with open_shard(path):  # checks header and length
        pass
    found: dict[str, Tensor] = {}
    reads: list[tuple[memoryview, int]] = []  # where to, and from which byte of the file
    with path.open("rb", buffering=0) as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
        for name in names:
            if name not in header:
                raise GraftError(f"{path}: has no tensor {name}; fetch or capture again")
            entry = header[name]
            dtype = _dtype(entry["dtype"], f"{path}: {name}")
            begin, end, shape = _extent(entry, rows)
            values = torch.empty(end - begin, dtype=torch.uint8, pin_memory=pinned)
            reads.extend(_parts(values.numpy().data, 8 + header_size + begin))
            found[name] = values.view(dtype).view(shape)
        with ThreadPoolExecutor(_READS) as pool:  # starts no more threads than there are reads
            list(pool.map(lambda read: _read_at(file, *read), reads))
    return found


def _extent(entry: Mapping[str, Any], rows: slice) -> tuple[int, int, list[int]]:
    """Return first byte, end and shape of a tensor's `rows`, by its header `entry`."""
    begin, end = entry["data_offsets"]
    shape: list[int] = entry["shape"]
    if shape and shape[0]:
        first, last, _ = rows.indices(shape[0])
        row = (end - begin) // shape[0]
        begin, end = begin + first * row, begin + max(first, last) * row
        shape = [max(last - first, 0), *shape[1:]]
    return begin, end, shape


def _parts(view: memoryview, start: int) -> Iterator[tuple[memoryview, int]]:
    """Yield what one read is to fill of `view`, and where in the file it begins."""
    for first in range(0, len(view), _READ_BYTES):
        yield view[first : first + _READ_BYTES], start + first


def _read_at(file: FileIO, view: memoryview, start: int) -> None:
    """Fill `view` from byte `start` of an unbuffered file."""
    while view:
        got = os.preadv(file.fileno(), [view], start)
        if not got:
            raise GraftError(
                f"{file.name!s}: was cut off while it was read; fetch or capture again"
            )
        view, start = view[got:], start + got


def check_index(folder: Path, prefix: str = "") -> dict[str, str]:
    """Return `read_index` after opening every shard it names and comparing names, both ways.

    Raises GraftError for a truncated or corrupt shard, an entry whose shard lacks the tensor, and
    a tensor (of a name with `prefix`) that the index does not list.
    """
    weight_map = read_index(folder, prefix)
    for shard in sorted(set(weight_map.values())):
        listed = {name for name, its_shard in weight_map.items() if its_shard == shard}
        with open_shard(folder / shard) as tensors:
            held = {name for name in tensors.keys() if name.startswith(prefix)}  # noqa: SIM118
        if missing := sorted(listed - held):
            raise GraftError(
                f"{folder / shard}: has no {missing[0]} ({len(missing)} missing in all), but "
                f"{INDEX_NAME} lists it; fetch again"
            )
        if unlisted := sorted(held - listed):
            raise GraftError(
                f"{folder / INDEX_NAME}: does not list {unlisted[0]} ({len(unlisted)} in all), "
                f"which {shard} holds; fetch the index again"
            )
    return weight_map


def read_meta(folder: Path, weight_map: Mapping[str, str]) -> dict[str, Tensor]:
    """Return meta tensors (shape and dtype, no values) of the names in `weight_map`."""
    found: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        with open_shard(folder / shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118, a handle is no mapping
                if weight_map.get(name) == shard:
                    part = tensors.get_slice(name)
                    dtype = _dtype(part.get_dtype(), f"{folder / shard}: {name}")
                    found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return {name: found[name] for name in weight_map}


def _dtype(name: str, where: str) -> torch.dtype:
    if name not in _DTYPES:
        raise GraftError(f"{where}: is {name}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


@contextmanager
def open_shard(path: Path) -> Iterator["safe_open"]:
    """Open one safetensors file, with a GraftError for a truncated or corrupt one."""
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise GraftError(f"{path}: not a readable safetensors file ({error})") from error
    with handle as tensors:
        yield tensors


def save_shard(tensors: Mapping[str, Tensor], path: Path, *, sync: bool = True) -> None:
    """Write one safetensors file under a temporary name, sync it and rename it into place.

    The bytes depend on names and values alone: safetensors orders its header itself. Without
    `sync` it outlives this process, killed or not, but perhaps not a power cut: for what can be
    computed again. Raises GraftError if the disk is full.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        save_file(contiguous, temporary, metadata={"format": "pt"})
        if sync:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())

    _write_whole(path, write, sum(map(num_bytes, tensors.values())))


def stream_shard(
    layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], path: Path
) -> None:
    """Write the bytes that `save_shard` would, with one tensor at a time in memory.

    `layout` has the shape and dtype of every tensor (meta tensors will do); `tensors` yields each
    of them once, in any order. Raises GraftError if the disk is full.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            starts = _write_header(layout, file)
            for name, tensor in tensors:
                expected = layout[name]
                assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
                file.seek(starts.pop(name))
                file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            assert not starts, f"{min(starts)}: laid out, but never given"
            file.flush()
            os.fsync(file.fileno())

    _write_whole(path, write, sum(map(num_bytes, layout.values())))


def _write_header(layout: Mapping[str, Tensor], file: BinaryIO) -> dict[str, int]:
    """Write a safetensors header; return where in the file each tensor's values start."""
    order = list(_DTYPE_NAMES)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    # Wide dtypes first, as the format's own writer does it: every value is aligned.
    for name in sorted(layout, key=lambda name: (order.index(layout[name].dtype), name)):
        starts[name], end = end, end + num_bytes(layout[name])
        header[name] = {
            "dtype": _DTYPE_NAMES[layout[name].dtype],
            "shape": list(layout[name].shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def write_json(value: object, path: Path) -> None:
    """Write JSON under a temporary name, sync it and rename it into place."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text file under a temporary name, sync it and rename it into place.

    Raises GraftError if the disk is full.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    _write_whole(path, write, len(text.encode()))


def _write_whole(path: Path, write: Callable[[Path], None], size: int) -> None:
    """Let `write` fill a temporary file, then rename it to `path`; leave nothing of a failure."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        if not is_full_disk(error):
            raise
        raise GraftError(
            f"{path}: the disk is full; {size:,} bytes are to be written there: "
            "make room and run again"
        ) from error


def is_full_disk(error: Exception) -> bool:
    """Say whether a failed write ran out of space or quota; safetensors has it in words only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "(os error 28)" in str(error)


def num_bytes(tensor: Tensor) -> int:
    """Return the size of a tensor's values in bytes."""
    return tensor.numel() * tensor.element_size()


def values_size(path: Path) -> int:
    """Return how many bytes of values a shard holds, by its size and its header's."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def write_index(
    weight_map: Mapping[str, str],
    total_size: int,
    folder: Path,
    metadata: Mapping[str, object] = {},
) -> None:
    """Write the index of a checkpoint; call it last, when every shard is in place."""
    content = {"metadata": {**metadata, "total_size": total_size}, "weight_map": dict(weight_map)}
    write_json(content, folder / INDEX_NAME)


def save_checkpoint(tensors: Mapping[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    """Write `tensors` as `model-0000i-of-0000n.safetensors` shards and their index.

    Shards are filled in the tensors' order; each holds at most `max_shard_bytes` of values.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + num_bytes(tensor) > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += num_bytes(tensor)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_shard(shard, folder / file_name)
        weight_map.update(dict.fromkeys(shard, file_name))
    write_index(weight_map, sum(map(num_bytes, tensors.values())), folder)
