"""Write checkpoints of DeepSeek-V4-Flash's width with random weights, with and without a head.

    python benchmarks/flash_width.py FOLDER --layers 5 17 [--width tiny]

For each number of layers N: FOLDER/base-N (W4A16-FP8 without head), FOLDER/int4-N and
FOLDER/mxfp4-N (the same with a head, made by the project's own splice), and if asked for
FOLDER/dspark-N (with a DSpark drafter of three stages, its experts MXFP4). The layers' pattern is
Flash's. At most five layers are stored, since all later ones are like the fourth or the fifth;
`worker_extension.py` lets vLLM load them again under the other names. Folders share their shards
by hard links. What is there already is kept.

Codes and scales are drawn, not computed from floats. Scales follow from the number of inputs, so
that every product has outputs of about the size of its inputs.
"""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from engines import NUM_STORED, layer_of
from record import MODEL
from synthetic_flash import FLASH, TINY, plain, with_dspark, write_upstream
from torch import Tensor

from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.quant_manifest import MANIFEST_NAME
from mtp_graft.checkpoint.quantization_config import add_head, read_quantization
from mtp_graft.checkpoint.shards import INDEX_NAME, Shard, read_index, save_shard, write_index
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.names import base_shapes
from mtp_graft.dsv4.variants import stored_as
from mtp_graft.recipe import Variant
from mtp_graft.stages.splice import HEAD_SHARD, splice

BUNDLED = MODEL / "base"
CONFIG = json.loads((BUNDLED / "config.json").read_text())
QUANTIZATION = read_quantization(CONFIG)
WIDTHS = {"flash": FLASH, "tiny": TINY}
VARIANTS: dict[str, Variant] = {"int4": "rtn", "mxfp4": "mxfp4", "dspark": "mxfp4"}
#: Root mean square of a uniform code from -8 to 7, and of an FP8 byte as `fp8_bytes` draws it.
INT4_RMS = math.sqrt(sum(code * code for code in range(-8, 8)) / 16)
FP8_RMS = math.sqrt(sum((m / 16) ** 2 + (m / 32) ** 2 for m in range(8, 16)) / 16)
GROUP = 128

Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 17])
    parser.add_argument("--width", choices=WIDTHS, default="flash")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=["int4", "mxfp4"])
    options = parser.parse_args()
    write_all(options.folder, WIDTHS[options.width], options.layers, options.variants)


def write_all(folder: Path, config: dict[str, Any], layers: list[int], variants: list[str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()

    def say(what: object) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {what}", flush=True)

    shards = folder / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    for number in range(-1, min(max(layers), NUM_STORED)):
        path = shards / shard_name(number)
        if not path.exists():
            save_shard(random_part(config, number, device), path)
            say(f"{path}, {path.stat().st_size / 1e9:.2f} GB")
    for name, its_config in {
        "upstream": config,
        "dspark": with_dspark(config, max(layers)),
    }.items():
        upstream = folder / name
        if (name == "upstream" or name in variants) and not (upstream / INDEX_NAME).exists():
            shutil.rmtree(upstream, ignore_errors=True)
            generator = torch.Generator(device).manual_seed(1)
            write_upstream(upstream, its_config, None, generator)
            say(upstream)
    for num_layers in layers:
        base = folder / f"base-{num_layers}"
        link_base(shards, base, config, num_layers)
        for variant in variants:
            out = folder / f"{variant}-{num_layers}"
            spliced = [path.parent for path in folder.glob(f"{variant}-*/{MANIFEST_NAME}")]
            if out in spliced or not spliced or variant == "dspark":
                head = folder / ("dspark" if variant == "dspark" else "upstream")
                splice(base, head, out, VARIANTS[variant])
            else:
                link_spliced(base, spliced[0], out, variant)
            say(out)


def shard_name(layer: int) -> str:
    return f"model-layer-{layer}.safetensors" if layer >= 0 else "model-outside.safetensors"


def link_base(shards: Path, base: Path, config: dict[str, Any], num_layers: int) -> None:
    """Put a base of `num_layers` layers together from the stored ones."""
    base.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    for number in range(-1, min(num_layers, NUM_STORED)):
        name = shard_name(number)
        if not (base / name).exists():
            os.link(shards / name, base / name)
        weight_map.update(dict.fromkeys(stored_shapes(config, number), name))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BUNDLED / name, base)  # which a splice expects
    write_json(base_config(config, num_layers), base / "config.json")
    write_index(weight_map, total_size(base, weight_map), base)


def link_spliced(base: Path, spliced: Path, out: Path, variant: str) -> None:
    """Put a base and a head that was spliced already together: rounding again takes minutes."""
    shutil.rmtree(out, ignore_errors=True)  # cheap to make again, if it was not finished
    shutil.copytree(base, out, copy_function=os.link)
    os.link(spliced / HEAD_SHARD, out / HEAD_SHARD)
    config = json.loads((base / "config.json").read_text())
    section, layer = config["quantization_config"], config["num_hidden_layers"]
    added = add_head(section, layer, VARIANTS[variant], "base")
    for name in ("config.json", INDEX_NAME):
        (out / name).unlink()  # a link to the base's
    write_json(config | {"quantization_config": added}, out / "config.json")
    head = {n: s for n, s in read_index(spliced).items() if s == HEAD_SHARD}
    weight_map = read_index(base) | head
    write_index(weight_map, total_size(out, weight_map), out)


def base_config(config: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return config.json of a base with so many layers; the head's entry comes last in ratios."""
    return config | {
        "architectures": ["DeepseekV4ForCausalLM"],
        "num_hidden_layers": num_layers,
        "compress_ratios": [*config["compress_ratios"][:num_layers], 0],
        "expert_dtype": "int4",
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.02,
        "use_cache": True,
        "quantization_config": CONFIG["quantization_config"],
    }


def logical_shapes(config: dict[str, Any], layer: int) -> Shapes:
    """Return plain name -> shape of one layer's tensors, or with -1 of those outside of layers."""
    wanted = layer if layer >= 0 else None
    shapes = base_shapes(config | {"num_hidden_layers": layer + 1 if layer >= 0 else 1})
    return {name: shape for name, shape in shapes.items() if layer_of(name) == wanted}


def stored_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return name -> (shape, dtype) as W4A16-FP8 stores them."""
    stored: dict[str, tuple[tuple[int, ...], Any]] = {}
    for name, shape in logical_shapes(config, layer).items():
        group = QUANTIZATION.group_of(f"model.{name.removesuffix('.weight')}")
        kind = QUANTIZATION.kind_of(group)
        like = stored_as(name, shape, kind, GROUP)
        stored |= {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in like.items()}
    return stored


def random_part(config: dict[str, Any], layer: int, device: str) -> dict[str, Tensor]:
    """Return the stored tensors of one layer; the same layer always gets the same values."""
    generator = torch.Generator(device).manual_seed(100 + layer)
    logical = logical_shapes(config, layer)
    return {
        name: random_tensor(name, shape, dtype, logical, config, generator).cpu()
        for name, (shape, dtype) in stored_shapes(config, layer).items()
    }


def random_tensor(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    logical: Shapes,
    config: dict[str, Any],
    generator: torch.Generator,
) -> Tensor:
    place: dict[str, Any] = {"generator": generator, "device": generator.device}
    weight = f"{name.rpartition('.')[0]}.weight"
    if name.endswith(".weight_shape"):
        return torch.tensor(logical[weight])
    if name.endswith(".weight_packed"):
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, **place).int()
    if name.endswith(".weight_scale"):
        rms = INT4_RMS if names.EXPERT.match(weight) else FP8_RMS
        scale = 1 / (rms * math.sqrt(logical[weight][-1]))
        return (scale * (1 + 0.1 * torch.rand(shape, **place))).to(dtype)
    if dtype == torch.float8_e4m3fn:
        return fp8_bytes(shape, place)
    if name.endswith(".tid2eid"):
        chosen = torch.rand(shape[0], config["n_routed_experts"], **place)
        return chosen.topk(shape[1]).indices.to(dtype)
    return plain(name, torch.randn(shape, **place)).to(dtype)


def fp8_bytes(shape: tuple[int, ...], place: dict[str, Any]) -> Tensor:
    """Return random E4M3 values of either sign with magnitudes from 0.25 up to 0.94."""
    magnitude = torch.randint(0x28, 0x38, shape, dtype=torch.uint8, **place)
    sign = torch.randint(0, 2, shape, dtype=torch.uint8, **place) << 7
    return (magnitude | sign).view(torch.float8_e4m3fn)


def total_size(folder: Path, weight_map: dict[str, str]) -> int:
    shards = sorted(set(weight_map.values()))
    return sum(t.nbytes for shard in shards for t in Shard(folder / shard).meta.values())


if __name__ == "__main__":
    main()
