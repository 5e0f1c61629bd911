"""Published checkpoints without their bytes: true configs, names, dtypes, shapes and shards.

The base's list is in `published/`, those of DeepSeek's masters are in ../shared. As files they are
sparse: 38 GB to read, and some megabytes on disk.
"""

import gzip
import json
import re
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD
from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.checkpoint.shards import _DTYPES, _write_header, write_index
from mtp_graft.dsv4.formats import modules_of
from mtp_graft.dsv4.head_shapes import base_shapes, head_shapes
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.memory import weights_bytes

PUBLISHED = Path(__file__).parent / "published"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
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
Tensors = dict[str, Tensor]  # without values


def _meta(dtype: str | torch.dtype, shape: Any) -> Tensor:
    return torch.empty(shape, dtype=_DTYPES.get(dtype, dtype), device="meta")  # type: ignore


@cache
def tensors() -> Tensors:
    """Return the base's and an INT4 head's."""
    found: Tensors = {}
    for line in (PUBLISHED / "flash_w4a16_fp8.tsv").read_text().splitlines():
        if line.startswith("#"):
            continue
        pattern, dtype, shape, layers = line.split("\t")
        tensor = _meta(dtype, json.loads(shape))
        experts = range(CONFIG["n_routed_experts"] if "{E}" in pattern else 1)
        for layer, expert in product(_WITH[layers], experts):
            found[pattern.replace("{L}", str(layer)).replace("{E}", str(expert))] = tensor
    return found


@cache
def weights(_folder: Path, tp: int, *, decoded: bool = False) -> int:
    """Return the bytes of weights on a rank, which no test need count again."""
    return weights_bytes(tensors(), tp, decoded=decoded)


class Published(NamedTuple):
    """A checkpoint's config, and the tensors of each of its shards."""

    config: dict[str, Any]
    shards: dict[str, Tensors]

    @property
    def tensors(self) -> Tensors:
        return {name: tensor for held in self.shards.values() for name, tensor in held.items()}

    def opened(self) -> Checkpoint:
        """Return what doctor reads from the files."""
        index = {name: shard for shard, held in self.shards.items() for name in held}
        return Checkpoint(Path("flash"), self.config, index, self.shards, {})

    def with_experts(self, number: int) -> "Published":
        """Return the same with the first few experts of each layer alone."""
        shards: dict[str, Tensors] = {}
        for shard, held in self.shards.items():
            kept = {n: t for n, t in held.items() if int((*re.findall(r"experts\.(\d+)", n), 0)[0]) < number}
            shards[shard] = {n: t[:number] if ".gate." in n and "tid2eid" not in n else t for n, t in kept.items()}
        return Published({**self.config, "n_routed_experts": number}, shards)

    def write(self, folder: Path) -> Path:
        """Write sparse files and return their folder."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        for shard, held in self.shards.items():
            with (folder / shard).open("wb") as file:
                _write_header(held, file)
                file.truncate(file.tell() + sum(tensor.nbytes for tensor in held.values()))
        index = {name: shard for shard, held in self.shards.items() for name in held}
        write_index(index, sum(tensor.nbytes for tensor in self.tensors.values()), folder)
        return folder


def _place(name: str, layers: int = len(_LAYERS)) -> int:
    """Return the number of the shard that a master has a tensor in."""
    match name.split("."):
        case ["embed", _]:
            return 1
        case ["layers", layer, *_]:
            return 2 + int(layer)
        case ["mtp", block, *_]:
            return layers + 3 + int(block)
    return layers + 2


@cache
def published_base() -> Published:
    """Return the base as it is published, in four shards of 38 GB."""
    base = {name: t for name, t in tensors().items() if not name.startswith("mtp.")}
    total, done = sum(tensor.nbytes for tensor in base.values()), 0
    shards: dict[str, Tensors] = {f"model-0000{n}-of-00004.safetensors": {} for n in range(1, 5)}
    for name in sorted(base, key=_place):
        [*shards.values()][4 * done // total][name] = base[name]
        done += base[name].nbytes
    return Published(CONFIG, shards)


@cache
def published_head() -> Published:
    """Return base and an INT4 head, as mtp-graft splices them."""
    quantization = add_head(CONFIG["quantization_config"], len(_LAYERS), "gptq", "base")
    head = {name: tensor for name, tensor in tensors().items() if name.startswith("mtp.")}
    shards = {**published_base().shards, HEAD_SHARD: head}
    return Published({**CONFIG, "quantization_config": quantization}, shards)


def read_shared(name: str) -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no lists of the masters' tensors: {SHARED} does not exist")
    return SHARED / name


@cache
def master(name: str) -> Published:
    """Return a master of DeepSeek's by its folder in ../shared."""
    folder = read_shared(name)
    config = json.loads((folder / "config.json").read_text())
    if (listed := folder / "tensors.full.tsv.gz").exists():
        lines = (line.split("\t") for line in gzip.open(listed, "rt"))
        found = {name: _meta(dtype, json.loads(shape)) for name, dtype, shape in lines}
    else:
        found = like_preview(config)
    layers = config["num_hidden_layers"]
    places = {tensor: _place(tensor, layers) for tensor in found}
    number = max(places.values())
    shards: dict[str, Tensors] = {f"model-{n:05}-of-{number:05}.safetensors": {} for n in range(1, number+1)}
    for tensor, place in places.items():
        shards[f"model-{place:05}-of-{number:05}.safetensors"][tensor] = found[tensor]
    return Published(config, shards)


def like_preview(config: dict[str, Any]) -> Tensors:
    """Return the tensors of a master of which the config alone is known, in the preview's dtypes."""
    dtypes = {re.sub(r"\.\d+\.", ".0.", name): t.dtype for name, t in master("deepseek-v4-flash").tensors.items()}
    found: Tensors = {}
    for name, shape in {**base_shapes(config), **head_shapes(config)}.items():
        dtype = dtypes[re.sub(r"\.\d+\.", ".0.", name)]
        scale = name.removesuffix(".weight") + ".scale"
        if dtype == torch.int8:  # two MXFP4 codes a byte
            outputs, inputs = shape
            shape, blocks = (outputs, inputs // 2), (outputs, inputs // 32)
        elif dtype == torch.float8_e4m3fn:
            blocks = tuple(-(-size // 128) for size in shape)
        found[name] = _meta(dtype, shape)
        if found[name].element_size() == 1:
            found[scale] = _meta(torch.float8_e8m0fnu, blocks)
    return found
