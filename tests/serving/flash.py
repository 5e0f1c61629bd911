"""The published DeepSeek-V4-Flash in W4A16-FP8 with a head: true names and shapes, no bytes.

Its shards are two sparse files, the base's of 152 GB and the head's, which take some 15 MB.
"""

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.checkpoint.shards import _write_header, write_index
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
_DTYPES = {
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


@cache
def tensors() -> dict[str, Tensor]:
    """Return the base's and an INT4 head's, without values."""
    found: dict[str, Tensor] = {}
    for line in (PUBLISHED / "flash_w4a16_fp8.tsv").read_text().splitlines():
        if line.startswith("#"):
            continue
        pattern, dtype, shape, layers = line.split("\t")
        tensor = torch.empty(json.loads(shape), dtype=_DTYPES[dtype], device="meta")
        experts = range(CONFIG["n_routed_experts"] if "{E}" in pattern else 1)
        for layer, expert in product(_WITH[layers], experts):
            found[pattern.replace("{L}", str(layer)).replace("{E}", str(expert))] = tensor
    return found


@cache
def weights(_folder: Path, tp: int, *, decoded: bool = False) -> int:
    """Return the bytes of weights on a rank, which no test need count again."""
    return weights_bytes(tensors(), tp, decoded=decoded)


@cache
def flash() -> Checkpoint:
    """Return base and head as headers alone."""
    quantization = add_head(CONFIG["quantization_config"], len(_LAYERS), "gptq", "base")
    shards: dict[str, dict[str, Tensor]] = {"model.safetensors": {}, "mtp.safetensors": {}}
    for name, tensor in tensors().items():
        shards["mtp.safetensors" if name.startswith("mtp.") else "model.safetensors"][name] = tensor
    index = {name: shard for shard, held in shards.items() for name in held}
    config = {**CONFIG, "quantization_config": quantization}
    return Checkpoint(Path("flash"), config, index, shards, {})


def write_flash(folder: Path) -> Path:
    """Write base and head as sparse files and return their folder."""
    folder.mkdir(parents=True)
    checkpoint = flash()
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    for shard, held in checkpoint.shards.items():
        with (folder / shard).open("wb") as file:
            _write_header(held, file)
            file.truncate(file.tell() + sum(tensor.nbytes for tensor in held.values()))
    write_index(checkpoint.index, 0, folder)
    return folder
