"""The oracle: transformers' DeepSeek-V4 in float32 on the dequantized tiny base."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4 import names
from mtp_graft.quant import fp8_block, int4


def dequantized(folder: Path) -> dict[str, Tensor]:
    """Return every weight of a W4A16-FP8 base in float32 under DeepSeek's names."""
    stored = load_tensors(folder)
    weights = {}
    for name, tensor in stored.items():
        if name.endswith((".weight_scale", ".weight_shape")):
            continue
        stem = name.removesuffix(".weight").removesuffix(".weight_packed")
        scale = stored.get(f"{stem}.weight_scale")
        if name.endswith(".weight_packed"):
            assert scale is not None
            weights[f"{stem}.weight"] = int4.decode(int4.unpack(tensor), scale)
        elif scale is not None:
            weights[name] = fp8_block.decode(tensor, scale)
        else:
            weights[name] = tensor.long() if name.endswith(".tid2eid") else tensor.float()
    return weights


def load_reference(folder: Path) -> torch.nn.Module:
    """Return the base as a transformers model in float32, eager attention."""
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("quantization_config")
    settings.pop("architectures")
    config = AutoConfig.for_model(**settings)
    config._attn_implementation = "eager"
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config).float().eval()
    weights = dequantized(folder)
    state = {}
    for name, tensor in model.state_dict().items():
        parts = [weights.pop(native) for native in names.split_experts(name, tensor)]
        state[name] = _joined(name, parts)
    assert not weights, f"tensors that transformers does not take: {list(weights)[:5]}"
    model.load_state_dict(state, strict=True)
    return model


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    if name.endswith(".gate_up_proj"):  # w1 and w3 of each expert, one after the other
        pairs = [torch.cat(pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
        return torch.stack(pairs)
    return torch.stack(parts) if name.endswith(".experts.down_proj") else parts[0]
