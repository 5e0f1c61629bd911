"""Straight-through fake quantization: what a weight is worth after storage, gradient passed on.

`export.py` stores what is rounded here; a test decodes it again. Here is arithmetic alone (no
tables, no packing), so that it runs inside a CUDA graph.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_graft.dsv4 import names
from mtp_graft.quant import FP8_BLOCK, MXFP4_GROUP, decode_fp8, encode_fp8
from mtp_graft.quant import int4 as int4_codes

FP8_MAX = 448.0
#: Linears that are FP8 in 128 x 128 blocks, in base layers and head alike.
FP8_LINEAR = re.compile(r"\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight$")
#: Further linears that upstream stores as FP8; the published W4A16-FP8 bases keep them in BF16.
FP8_UPSTREAM_ONLY = re.compile(
    r"(^mtp\.\d+\.(e_proj|h_proj|main_proj)|\.shared_experts\.w[123])\.weight$"
)


def int4(weight: Tensor) -> Tensor:
    """Round [..., I] to symmetric INT4 with one BF16 scale per 128 inputs."""
    scale = int4_codes.group_scale(weight, 128)
    return int4_codes.decode(int4_codes.encode(weight, scale), scale)


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


def fp8_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round [O, I] to E4M3 codes; the BF16 scale of 128 x 128 maps the block's absmax to 448."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    scale = (blocks.abs().amax(dim=(1, 3), keepdim=True) / FP8_MAX).bfloat16()
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (blocks / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(2, 3).flatten(0, 1)[:rows, :columns], scale[:, 0, :, 0]


def fp8_bf16_scale(weight: Tensor) -> Tensor:
    """Round to FP8 blocks with BF16 scales, the base's format."""
    return decode_fp8(*fp8_parts(weight))


def fp8_power_of_two_scale(weight: Tensor) -> Tensor:
    """Round to FP8 blocks with E8M0 scales, the upstream head's format."""
    return decode_fp8(*encode_fp8(weight))


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
