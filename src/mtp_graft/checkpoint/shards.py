"""Safetensors checkpoints on disk: shards, their index, and reading single tensors from them."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtp_graft.errors import GraftError

INDEX_NAME = "model.safetensors.index.json"


def read_index(folder: Path) -> dict[str, str]:
    """Return the checkpoint's weight map, tensor name to shard file name.

    Raises GraftError if the index is missing or unreadable, or names a shard that is not there.
    """
    path = folder / INDEX_NAME
    try:
        weight_map: dict[str, str] = json.loads(path.read_text())["weight_map"]
    except FileNotFoundError:
        raise GraftError(f"{path}: not found; expected a sharded safetensors checkpoint") from None
    except (ValueError, KeyError, TypeError) as error:
        raise GraftError(f"{path}: not a safetensors index ({error!r})") from error
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise GraftError(f"{folder / shard}: not found, but {path.name} lists it; fetch again")
    return weight_map


def load_tensors(folder: Path, names: list[str] | None = None) -> dict[str, Tensor]:
    """Load tensors by name (all of them by default) from the checkpoint in `folder`."""
    weight_map = read_index(folder)
    wanted = list(weight_map) if names is None else names
    missing = [name for name in wanted if name not in weight_map]
    if missing:
        raise GraftError(f"{folder}: no tensor {missing[0]} ({len(missing)} missing in all)")
    by_shard: dict[str, list[str]] = {}
    for name in wanted:
        by_shard.setdefault(weight_map[name], []).append(name)
    loaded: dict[str, Tensor] = {}
    for shard, shard_names in by_shard.items():
        with open_shard(folder / shard) as tensors:
            for name in shard_names:
                try:
                    loaded[name] = tensors.get_tensor(name)
                except SafetensorError as error:
                    raise GraftError(f"{folder / shard}: {error}; the index lists it") from error
    return {name: loaded[name] for name in wanted}


@contextmanager
def open_shard(path: Path) -> Iterator["safe_open"]:
    """Open one safetensors file, with a GraftError for a truncated or corrupt one."""
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise GraftError(f"{path}: not a readable safetensors file ({error})") from error
    with handle as tensors:
        yield tensors


def save_shard(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file under a temporary name, sync it and rename it into place.

    The bytes depend on names and values alone: safetensors orders its header itself.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata={"format": "pt"})
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    temporary.rename(path)


def write_json(value: object, path: Path) -> None:
    """Write JSON under a temporary name, sync it and rename it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


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
