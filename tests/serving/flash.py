"""Published checkpoints without their bytes: true configs, names, dtypes, shapes and shards.

The lists are those of ../shared; what needs one is skipped without. As files they are sparse:
38 GB to read, and some megabytes on disk.
"""

import gzip
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD
from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.checkpoint.shards import _DTYPES, _write_header, write_index
from mtp_graft.dsv4.names import base_shapes, head_shapes
from mtp_graft.dsv4.variants import store_head
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.memory import weights_bytes

SHARED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
BASE, PREVIEW = "pastapaul-w4a16-fp8", "deepseek-v4-flash"
CONFIG: dict[str, Any] = json.loads(Path(__file__).with_name("published_base.json").read_text())
LAYERS = CONFIG["num_hidden_layers"]
Tensors = dict[str, Tensor]  # without values


class Published(NamedTuple):
    """A checkpoint's config, and the tensors of each of its shards."""

    config: dict[str, Any]
    shards: dict[str, Tensors]

    @property
    def tensors(self) -> Tensors:
        return {name: tensor for held in self.shards.values() for name, tensor in held.items()}

    @property
    def index(self) -> dict[str, str]:
        return {name: shard for shard, held in self.shards.items() for name in held}

    def read(self) -> Checkpoint:
        """Return what doctor would read from the files."""
        return Checkpoint(Path("flash"), self.config, self.index, self.shards, {})

    def with_experts(self, number: int) -> "Published":
        """Return the same with the first few experts of each layer alone."""

        def fewer(held: Tensors) -> Tensors:
            kept = {n: t for n, t in held.items() if int((*_EXPERT.findall(n), 0)[0]) < number}
            return {n: t[:number] if _ROUTER.search(n) else t for n, t in kept.items()}

        shards = {shard: fewer(held) for shard, held in self.shards.items()}
        return Published({**self.config, "n_routed_experts": number}, shards)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')  # not public
        for name in ("generation_config.json", "tokenizer_config.json"):
            (folder / name).write_bytes((shared(PREVIEW) / name).read_bytes())
        for shard, held in self.shards.items():
            with (folder / shard).open("wb") as file:
                _write_header(held, file)
                file.truncate(file.tell() + _size(held))
        write_index(self.index, _size(self.tensors), folder)
        return folder


_EXPERT, _ROUTER = re.compile(r"experts\.(\d+)"), re.compile(r"\.gate\.(weight|.*bias)$")


def _size(held: Tensors) -> int:
    return sum(tensor.nbytes for tensor in held.values())


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def shared(name: str) -> Path:
    """Return a checkpoint's folder in ../shared."""
    if not SHARED.is_dir():
        pytest.skip(f"no lists of published tensors: {SHARED} does not exist")
    return SHARED / name


@cache
def listed(name: str) -> Tensors:
    """Return all tensors of a checkpoint; without a list, what its config asks for."""
    file = shared(name) / "tensors.full.tsv.gz"
    if not file.exists():
        return like_preview(json.loads(file.with_name("config.json").read_text()))
    fields = [line.split("\t") for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    return {name: meta(_DTYPES[dtype], *json.loads(shape)) for name, dtype, shape in fields}


def like_preview(config: dict[str, Any]) -> Tensors:
    def any_layer(name: str) -> str:
        return re.sub(r"\.\d+\.", ".N.", name)

    dtypes = {any_layer(name): tensor.dtype for name, tensor in listed(PREVIEW).items()}
    found: Tensors = {}
    for name, shape in {**base_shapes(config), **head_shapes(config)}.items():
        dtype = dtypes[any_layer(name)]
        is_mxfp4 = dtype == torch.int8  # two codes a byte, and a scale for 32 inputs
        found[name] = meta(dtype, *((shape[0], shape[1] // 2) if is_mxfp4 else shape))
        if dtype.itemsize == 1:
            block = (1, 32) if is_mxfp4 else (128, 128)
            scales = [-(-size // per) for size, per in zip(shape, block, strict=True)]
            found[f"{name.removesuffix('weight')}scale"] = meta(torch.float8_e8m0fnu, *scales)
    return found


def _shard(name: str, layers: int) -> int:
    """Return in which of its shards a master has a tensor."""
    match name.split("."):
        case ["embed", _]:
            return 0
        case ["layers", layer, *_]:
            return 1 + int(layer)
        case ["mtp", block, *_]:
            return layers + 2 + int(block)
    return layers + 1


def _as_shards(shards: list[Tensors]) -> dict[str, Tensors]:
    names = (f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1))
    return dict(zip(names, shards, strict=True))


@cache
def published(name: str) -> Published:
    """Return the base, whose four shards have 38 GB each, or one of DeepSeek's masters."""
    tensors = listed(name)
    config = CONFIG if name == BASE else json.loads((shared(name) / "config.json").read_text())
    place = {tensor: _shard(tensor, config["num_hidden_layers"]) for tensor in tensors}
    shards: list[Tensors] = [{} for _ in range(4 if name == BASE else max(place.values()) + 1)]
    done, size = 0, _size(tensors)
    for tensor in sorted(tensors, key=lambda tensor: (place[tensor], tensor)):
        shards[4 * done // size if name == BASE else place[tensor]][tensor] = tensors[tensor]
        done += tensors[tensor].nbytes
    return Published(config, _as_shards(shards))


@cache
def with_head() -> Published:
    """Return the base with an INT4 head, as they are after a splice."""
    quantization = add_head(CONFIG["quantization_config"], LAYERS, "gptq", "base")
    head = {name: t for name, t in listed(PREVIEW).items() if name.startswith("mtp.")}
    shards = {**published(BASE).shards, HEAD_SHARD: store_head(head, "rtn")}
    return Published({**CONFIG, "quantization_config": quantization}, shards)


@cache
def flash() -> Checkpoint:
    return with_head().read()


@cache
def weights(_folder: Path, tp: int, *, decoded: bool = False) -> int:
    """Return the bytes of weights on a rank, which no test need count again."""
    return weights_bytes(with_head().tensors, tp, decoded=decoded)
