"""Straight-through fake quantization: what a weight is worth after storage, gradient passed on.

The rules are those of `mtp_graft.quant`, whose encode/decode pairs write the checkpoints; a test
holds the two together. Here they are arithmetic alone (no tables, no packing), so that they run
inside a CUDA graph.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

from mtp_graft.dsv4 import names

INT4_GROUP, MXFP4_GROUP, FP8_BLOCK = 128, 32, 128
FP8_MAX = 448.0


def int4(weight: Tensor) -> Tensor:
    """Round [..., I] to symmetric INT4 with one BF16 scale per 128 inputs."""
    groups = weight.unflatten(-1, (-1, INT4_GROUP))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 7.5).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)


def mxfp4(weight: Tensor) -> Tensor:
    """Round [..., I] to E2M1 with one power-of-two scale per 32 inputs."""
    groups = weight.unflatten(-1, (-1, MXFP4_GROUP))
    absmax = groups.abs().amax(dim=-1, keepdim=True)
    scale = torch.ldexp(torch.ones_like(absmax), torch.frexp(absmax).exponent - 3)
    scaled = groups / torch.where(absmax > 0, scale, 1.0)
    # E2M1's grid is 0.5 apart below 2, 1 below 4, 2 up to 6; round() sends ties to even codes.
    magnitude = scaled.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((scaled / step).round() * step).clamp(-6, 6).mul(scale).flatten(-2)


def _fp8(weight: Tensor, scale_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Round [O, I] to E4M3 with one scale per 128 x 128 block, made from the block's absmax."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    absmax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = scale_of(absmax)
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten(2, 3).flatten(0, 1)[:rows, :columns]


def fp8_bf16_scale(weight: Tensor) -> Tensor:
    """Round to FP8 blocks with BF16 scales, the base's format."""
    return _fp8(weight, lambda absmax: (absmax / FP8_MAX).bfloat16().float())


def fp8_power_of_two_scale(weight: Tensor) -> Tensor:
    """Round to FP8 blocks with E8M0 scales, the upstream head's format."""
    return _fp8(weight, lambda absmax: torch.exp2(torch.ceil(torch.log2(absmax / FP8_MAX))))


def bf16(weight: Tensor) -> Tensor:
    """Round to BF16."""
    return weight.bfloat16().float()


def straight_through(weight: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """Return quantize(weight), with the identity's gradient."""
    quantized = quantize(weight.detach())
    return quantized + (weight - weight.detach())


def base_format(name: str) -> Callable[[Tensor], Tensor] | None:
    """Return how the base stores this transformers parameter; None for float32."""
    if ".mlp.experts." in name:
        return int4
    native = names.from_transformers(name)
    if names.FP8_LINEAR.search(native):
        return fp8_bf16_scale
    return None if names.FLOAT32.search(native) else bf16


def head_format(name: str) -> Callable[[Tensor], Tensor] | None:
    """Return how upstream stores this `MTPHead` parameter; None for float32."""
    if ".mlp.experts." in name:
        return mxfp4
    native = "mtp.0" + names.from_transformers("." + name.removeprefix("layer."))
    if names.FP8_LINEAR.search(native) or names.FP8_UPSTREAM_ONLY.search(native):
        return fp8_power_of_two_scale
    return None if names.FLOAT32.search(native) else bf16
