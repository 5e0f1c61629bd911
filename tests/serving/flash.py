"""The published DeepSeek-V4-Flash in W4A16-FP8 with a head: true names and shapes, no bytes.

Its shards are sparse files: four of 38 GB, as published, and the head's, which take some 15 MB.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.checkpoint.shards import read_meta
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.memory import weights_bytes

PUBLISHED = Path(__file__).parent / "published"
CONFIG: dict[str, Any] = json.loads((PUBLISHED / "flash_w4a16_fp8.config.json").read_text())
_LAYERS = range(CONFIG["num_hidden_layers"])
_WITH = {
    "-": range(1),
    "all": _LAYERS,
    "hash": range(CONFIG["num_hash_layers"]),
    "scored": range(CONFIG["num_hash_layers"], len(_LAYERS)),
    "ratio 4": [n for n in _LAYERS if CONFIG["compress_ratios"][n] == 4],
    "ratio 128": [n for n in _LAYERS if CONFIG["compress_ratios"][n] == 128],
}
DTYPES = {
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
HEAD_SHARD = "model-mtp-w4a16.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, tuple[str, list[int]]]  # name -> dtype, shape


@cache
def cached_weights(folder: Path, tp: int, *, decoded: bool = False) -> int:
    """Return the weights of a rank; the 103,000 headers of a folder are read once."""
    return weights_bytes(_headers(folder), tp, decoded=decoded)


@cache
def _headers(folder: Path) -> dict[str, torch.Tensor]:
    return read_meta(folder)


@cache
def published() -> Tensors:
    """Return the tensors of the base and of a head in INT4."""
    tensors: Tensors = {}
    for line in (PUBLISHED / "flash_w4a16_fp8.tsv").read_text().splitlines():
        if line.startswith("#"):
            continue
        pattern, dtype, shape, layers = line.split("\t")
        for layer in _WITH[layers]:
            for expert in range(CONFIG["n_routed_experts"] if "{E}" in pattern else 1):
                name = pattern.replace("{L}", str(layer)).replace("{E}", str(expert))
                tensors[name] = dtype, json.loads(shape)
    return tensors


def in_shards(tensors: Tensors) -> dict[str, Tensors]:
    """Return shard -> its tensors: the head's, and four of the base."""
    base = [name for name in tensors if not name.startswith("mtp.")]
    size = -(-len(base) // 4)
    shards = {
        f"model-{n + 1:05d}-of-00004.safetensors": base[n * size : (n + 1) * size] for n in range(4)
    }
    head = [name for name in tensors if name.startswith("mtp.")]
    found = {shard: {name: tensors[name] for name in names} for shard, names in shards.items()}
    return found | ({HEAD_SHARD: {name: tensors[name] for name in head}} if head else {})


def config() -> dict[str, Any]:
    quantization = add_head(CONFIG["quantization_config"], len(_LAYERS), "gptq", "base")
    return {**CONFIG, "quantization_config": quantization}


def flash() -> Checkpoint:
    """Return base and head as headers alone."""
    shards = {
        shard: {
            name: torch.empty(shape, dtype=DTYPES[dtype], device="meta")
            for name, (dtype, shape) in tensors.items()
        }
        for shard, tensors in in_shards(published()).items()
    }
    index = {name: shard for shard, tensors in shards.items() for name in tensors}
    return Checkpoint(Path("flash"), config(), index, shards, {})


def write_shard(file: Path, tensors: Tensors) -> None:
    entries, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + at)


def write_flash(folder: Path) -> Path:
    """Write base and head as sparse files and return their folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config()))
    weight_map = {}
    for shard, tensors in in_shards(published()).items():
        write_shard(folder / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder
