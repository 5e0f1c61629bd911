"""Quantize a trained tiny model and write it as the two checkpoints that people start from.

`base/` is a W4A16-FP8 checkpoint without `mtp.*`, as the published quantizations are; `upstream/`
holds the head alone in DeepSeek's own format: MXFP4 experts, FP8 linears with E8M0 scales.
"""

import json
from pathlib import Path
from typing import Any

import torch
from fake_quant import FP8_LINEAR, FP8_UPSTREAM_ONLY, fp8_parts, mxfp4_parts
from torch import Tensor

from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.shards import save_shard, write_index
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.variants import int4_parts
from mtp_graft.quant import encode_fp8, int4

MAX_SHARD_BYTES = 15 * 2**20
UPSTREAM_SHARD = "model-00002-of-00002.safetensors"
#: FP8 attention linears, INT4 routed experts: as the bundled base says.
CONFIG = Path(__file__).parent.parent / "base" / "config.json"
QUANTIZATION = json.loads(CONFIG.read_text())["quantization_config"]


def base_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return the W4A16-FP8 storage of one base tensor."""
    module = name.removesuffix(".weight")
    if names.EXPERT.match(name):
        scale = int4.group_scale(weight, group_size=128)
        parts = int4_parts(int4.encode(weight, scale), scale)
        return {f"{module}.{part}": tensor for part, tensor in parts.items()}
    if FP8_LINEAR.search(name):
        codes, scale = fp8_parts(weight)
        return {name: codes, f"{module}.weight_scale": scale}
    return {name: weight.to(names.storage_dtype(name))}


def pack_e2m1(values: Tensor) -> Tensor:
    """Return E2M1 values [O, I] as int8 [O, I/2], the lower-indexed input in the low nibble."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.searchsorted(magnitudes.to(values.device), values.abs()) + 8 * values.signbit()
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low + 16 * high).to(torch.uint8).view(torch.int8)


def upstream_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return the upstream storage of one tensor of the head."""
    if names.EXPERT.match(name):
        values, scale = mxfp4_parts(weight)
        codes = pack_e2m1(values)
    elif FP8_LINEAR.search(name) or FP8_UPSTREAM_ONLY.search(name):
        codes, scale = encode_fp8(weight)
    else:
        return {name: weight.to(names.storage_dtype(name))}
    return {name: codes, f"{name.removesuffix('.weight')}.scale": scale.to(torch.float8_e8m0fnu)}


def export(base: dict[str, Tensor], head: dict[str, Tensor], config: Path, out: Path) -> None:
    """Write `out/base` and `out/upstream`.

    `base` is a transformers `DeepseekV4ForCausalLM` state dict, `head` one of `MTPHead`, both on
    the CPU in float32; `config` is the model's config.json.
    """
    settings = json.loads(config.read_text())
    (out / "base").mkdir(parents=True, exist_ok=True)
    from huggingface_hub import save_torch_state_dict

    stored: dict[str, Tensor] = {}
    for theirs, tensor in base.items():
        for name, weight in names.split_experts(theirs, tensor).items():
            stored |= base_tensors(name, weight)
    save_torch_state_dict(stored, out / "base", max_shard_size=MAX_SHARD_BYTES)
    quantized = {**settings, "quantization_config": QUANTIZATION}
    write_json(quantized, out / "base" / "config.json")

    write_upstream(names.head_from_module(head), settings, out / "upstream", UPSTREAM_SHARD)


def write_upstream(
    drafter: dict[str, Tensor], settings: dict[str, Any], out: Path, *shards: str
) -> None:
    """Write float32 `mtp.*` tensors as upstream does, the blocks' shards in the order of blocks."""
    held: dict[str, dict[str, Tensor]] = {shard: {} for shard in shards}
    for name, weight in drafter.items():
        held[shards[int(name.split(".")[1])]].update(upstream_tensors(name, weight))
    write_checkpoint(held, settings | {"expert_dtype": "fp4"}, out)


def write_checkpoint(
    shards: dict[str, dict[str, Tensor]], settings: dict[str, Any], out: Path
) -> None:
    """Write tensors by shard, the config and the index."""
    out.mkdir(parents=True, exist_ok=True)
    for shard, tensors in shards.items():
        save_shard(tensors, out / shard)
    places = {name: shard for shard, tensors in shards.items() for name in tensors}
    size = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    write_json(settings, out / "config.json")
    write_index(places, size, out)
