"""Straight-through fake quantization: what a weight is worth after storage, gradient passed on.

`export.py` stores what is rounded here; a test decodes it again with `mtp_graft.quant`. Here is
arithmetic alone (no tables, no packing), so that it runs inside a CUDA graph.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

from mtp_graft.dsv4 import names
from mtp_graft.quant import decode_fp8

INT4_GROUP, MXFP4_GROUP, FP8_BLOCK = 128, 32, 128
FP8_MAX = 448.0
#: Linears that are FP8 in 128 x 128 blocks, in base layers and head alike.
FP8_LINEAR = re.compile(r"\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight$")
#: Further linears that upstream stores as FP8; the published W4A16-FP8 bases keep them in BF16.
FP8_UPSTREAM_ONLY = re.compile(
    r"(^mtp\.\d+\.(e_proj|h_proj|main_proj)|\.shared_experts\.w[123])\.weight$"
)


def int4(weight: Tensor) -> Tensor:
    """Round [..., I] to symmetric INT4 with one BF16 scale per 128 inputs."""
    groups = weight.unflatten(-1, (-1, INT4_GROUP))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 7.5).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)


def mxfp4_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round [..., I] to E2M1 values; the scale of 32 inputs is 2 ** (floor(log2(absmax)) - 2)."""
    groups = weight.unflatten(-1, (-1, MXFP4_GROUP))
    absmax = groups.abs().amax(dim=-1, keepdim=True)
    scale = torch.ldexp(torch.ones_like(absmax), torch.frexp(absmax).exponent - 3)
    scale = torch.where(absmax > 0, scale, 1.0)
    scaled = groups / scale
    # E2M1's grid is 0.5 apart below 2, 1 below 4, 2 up to 6; round() sends ties to even codes.
    magnitude = scaled.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((scaled / step).round() * step).clamp(-6, 6).flatten(-2), scale.squeeze(-1)


def mxfp4(weight: Tensor) -> Tensor:
    """Round [..., I] to MXFP4, upstream's format of experts."""
    values, scale = mxfp4_parts(weight)
    return (values.unflatten(-1, (-1, MXFP4_GROUP)) * scale.unsqueeze(-1)).flatten(-2)


def fp8_parts(weight: Tensor, scale_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Round [O, I] to E4M3 codes, and one scale per 128 x 128 block by the block's absmax."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    absmax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = scale_of(absmax)
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(2, 3).flatten(0, 1)[:rows, :columns], scale[:, 0, :, 0]


def bf16_scale(absmax: Tensor) -> Tensor:
    """Return the BF16 scale that maps a block's absmax to 448."""
    return (absmax / FP8_MAX).bfloat16().float()


def power_of_two_scale(absmax: Tensor) -> Tensor:
    """Return the least power of two by which a block fits."""
    # 448 is 0.875 * 2**9. Comparing mantissas is exact; a rounded log2 would miss by one there.
    mantissa, exponent = torch.frexp(absmax)
    return torch.ldexp(torch.ones_like(absmax), exponent - 9 + (mantissa > 0.875))


def fp8_bf16_scale(weight: Tensor) -> Tensor:
    """Round to FP8 blocks with BF16 scales, the base's format."""
    return decode_fp8(*fp8_parts(weight, bf16_scale))


def fp8_power_of_two_scale(weight: Tensor) -> Tensor:
    """Round to FP8 blocks with E8M0 scales, the upstream head's format."""
    return decode_fp8(*fp8_parts(weight, power_of_two_scale))


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
    if FP8_LINEAR.search(native):
        return fp8_bf16_scale
    return None if names.FLOAT32.search(native) else bf16


def head_format(name: str) -> Callable[[Tensor], Tensor] | None:
    """Return how upstream stores this parameter of a drafter; None for float32."""
    if ".mlp.experts." in name:
        return mxfp4
    native = "mtp.0" + names.from_transformers("." + names.OF_STAGE.sub("", name))
    if FP8_LINEAR.search(native) or FP8_UPSTREAM_ONLY.search(native):
        return fp8_power_of_two_scale
    return None if names.FLOAT32.search(native) else bf16
