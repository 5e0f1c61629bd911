"""Write checkpoints of DeepSeek-V4-Flash's width with random weights, with and without a head.

    python benchmarks/flash_width.py FOLDER --layers 5 17 [--stored 8] [--width tiny]

For each number of layers N: FOLDER/base-N (W4A16-FP8 without head), FOLDER/int4-N and
FOLDER/mxfp4-N (the same with a head, made by the project's own splice), and if asked for
FOLDER/dspark-N (with a DSpark drafter of three stages, its experts MXFP4). The layers' pattern is
Flash's. Of more than `--stored` layers five are stored, since all later ones are like the fourth
or the fifth; `worker_extension.py` lets vLLM load them again under the other names. Folders share
their shards by hard links. What is there already is kept.

Codes and scales are drawn, not computed from floats. Scales follow from the number of inputs, so
that every product has outputs of about the size of its inputs.
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from engines import NUM_STORED, layer_of
from record import MODEL
from synthetic_flash import FLASH, TINY, plain, with_dspark, write_upstream
from torch import Tensor

from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.quantization_config import read_quantization
from mtp_graft.checkpoint.shards import INDEX_NAME, read_index, save_shard, write_index
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.names import base_shapes
from mtp_graft.dsv4.variants import stored_as
from mtp_graft.recipe import Variant
from mtp_graft.stages.inputs import drafter_config
from mtp_graft.stages.splice import HEAD_SHARD, config_with_head, splice

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
Stored = tuple[tuple[int, ...], torch.dtype]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 17])
    parser.add_argument("--width", choices=WIDTHS, default="flash")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=["int4", "mxfp4"])
    parser.add_argument("--stored", type=int, default=NUM_STORED, help="all of so many layers")
    options = parser.parse_args()
    folder, config, shards = options.folder, WIDTHS[options.width], options.folder / "shards"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards.mkdir(parents=True, exist_ok=True)
    layers = sorted({*options.layers, min(NUM_STORED, max(options.layers))})  # a whole one first
    stored = {n: n if n <= options.stored else NUM_STORED for n in layers}
    for number in range(-1, max(stored.values())):
        path = shards / shard_name(number)
        if not path.exists():
            save_shard(random_part(config, number, device), path)
            print(path, flush=True)
    for name, its in (("upstream", config), ("dspark", with_dspark(config, max(stored)))):
        wanted = name == "upstream" or name in options.variants
        if wanted and not (folder / name / INDEX_NAME).exists():
            shutil.rmtree(folder / name, ignore_errors=True)
            write_upstream(folder / name, its, None, torch.Generator(device).manual_seed(1))
    for num_layers in layers:
        base = folder / f"base-{num_layers}"
        link_base(shards, base, config, num_layers, stored[num_layers])
        for variant in options.variants:
            out, head = folder / f"{variant}-{num_layers}", folder / "upstream"
            if variant == "dspark":  # which reads the base's last layers
                head = folder / "dspark"
                write_json(with_dspark(config, num_layers), head / "config.json")
            if stored[num_layers] == num_layers:
                splice(base, head, out, VARIANTS[variant])
            else:
                link_spliced(base, folder / f"{variant}-{NUM_STORED}", head, out, VARIANTS[variant])
            print(out, flush=True)


def shard_name(layer: int) -> str:
    return f"model-layer-{layer}.safetensors" if layer >= 0 else "model-outside.safetensors"


def link_base(
    shards: Path, base: Path, config: dict[str, Any], num_layers: int, stored: int
) -> None:
    """Put a base of `num_layers` layers together, of which so many are stored."""
    base.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    for number in range(-1, stored):
        name = shard_name(number)
        if not (base / name).exists():
            os.link(shards / name, base / name)
        weight_map.update(dict.fromkeys(stored_shapes(config, number), name))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BUNDLED / name, base)  # which a splice expects
    write_json(base_config(config, num_layers), base / "config.json")
    sizes = ((base / shard).stat().st_size for shard in set(weight_map.values()))
    write_index(weight_map, sum(sizes), base)


def link_spliced(base: Path, spliced: Path, head: Path, out: Path, variant: Variant) -> None:
    """Put a base that is stored in part and the head of a whole one together."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base, out, copy_function=os.link)
    os.link(spliced / HEAD_SHARD, out / HEAD_SHARD)
    config, weight_map = json.loads((base / "config.json").read_text()), read_index(spliced, "mtp.")
    drafter = drafter_config(head, weight_map)
    write_json(config_with_head(config, drafter, variant, "base"), out / "config.json")
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    write_index(read_index(base) | weight_map, size, out)


def base_config(config: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return config.json of a base with so many layers; the head's entry comes last in ratios."""
    ratios = [*config["compress_ratios"][:num_layers], 0]
    return CONFIG | config | {"num_hidden_layers": num_layers, "compress_ratios": ratios}


def logical_shapes(config: dict[str, Any], layer: int) -> Shapes:
    """Return plain name -> shape of one layer's tensors, or with -1 of those outside of layers."""
    wanted = layer if layer >= 0 else None
    shapes = base_shapes(config | {"num_hidden_layers": layer + 1 if layer >= 0 else 1})
    return {name: shape for name, shape in shapes.items() if layer_of(name) == wanted}


def stored_shapes(config: dict[str, Any], layer: int) -> dict[str, Stored]:
    """Return name -> (shape, dtype) as W4A16-FP8 stores them."""
    stored: dict[str, Stored] = {}
    for name, shape in logical_shapes(config, layer).items():
        group = QUANTIZATION.group_of(f"model.{name.removesuffix('.weight')}")
        kind = QUANTIZATION.kind_of(group)
        like = stored_as(name, shape, kind, GROUP)
        stored |= {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in like.items()}
    return stored


def random_part(config: dict[str, Any], layer: int, device: str) -> dict[str, Tensor]:
    """Return the stored tensors of one layer; the same layer always gets the same values."""
    generator = torch.Generator(device).manual_seed(100 + layer)
    logical, experts = logical_shapes(config, layer), config["n_routed_experts"]
    return {
        name: random_tensor(name, like, logical, experts, generator).cpu()
        for name, like in stored_shapes(config, layer).items()
    }


def random_tensor(
    name: str, like: Stored, logical: Shapes, experts: int, generator: torch.Generator
) -> Tensor:
    shape, dtype = like
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
        chosen = torch.rand(shape[0], experts, **place)
        return chosen.topk(shape[1]).indices.to(dtype)
    return plain(name, torch.randn(shape, **place)).to(dtype)


def fp8_bytes(shape: tuple[int, ...], place: dict[str, Any]) -> Tensor:
    """Return random E4M3 values of either sign with magnitudes from 0.25 up to 0.94."""
    magnitude = torch.randint(0x28, 0x38, shape, dtype=torch.uint8, **place)
    sign = torch.randint(0, 2, shape, dtype=torch.uint8, **place) << 7
    return (magnitude | sign).view(torch.float8_e4m3fn)


if __name__ == "__main__":
    main()
