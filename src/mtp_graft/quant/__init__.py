"""Number formats: tensors in, tensors out.

FP8 blocks and MXFP4 are below, INT4 is in `int4`; MXFP4 is only read.

Shape legend of this package: O outputs, I inputs, G groups along the inputs. Leading
dimensions (experts, say) pass through every function unchanged.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

#: Outputs, and inputs, that share an FP8 scale.
FP8_BLOCK = 128
#: Inputs that share an MXFP4 scale.
MXFP4_GROUP = 32
#: Tensors without values, not to be changed: of a model's thousands of matrices only a few differ.
meta = cache(partial(torch.empty, device="meta"))
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1


def decode_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weights [O, I] of E4M3 codes and their blocks' scales (any float type).

    DeepSeek ships its linears like this. Upstream scales are E8M0, powers of two, which the BF16
    and F32 of compressed-tensors' FP8_BLOCK hold exactly.
    """
    scales = scale.float().repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return codes.float() * scales[: codes.shape[0], : codes.shape[1]]


def encode_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return E4M3 codes [O, I] of float32 weights, and an E8M0 scale for each block, as upstream's.

    A scale is the least power of two by which its block's largest magnitude is at most 448.
    """
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    # 448 is 0.875 * 2**9. Comparing mantissas is exact; a rounded log2 would miss by one there.
    mantissa, exponent = torch.frexp(blocks.abs().amax(dim=(1, 3), keepdim=True))
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - 9 + (mantissa > 0.875))
    codes = (blocks / scale).to(torch.float8_e4m3fn).flatten(2, 3).flatten(0, 1)
    return codes[:rows, :columns], scale[:, 0, :, 0].to(torch.float8_e8m0fnu)


def decode_mxfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weights [..., O, I] of E2M1 codes [..., O, I/2] and E8M0 scales.

    A nibble is sign, two exponent bits and one mantissa bit; a byte holds two, the lower-indexed
    input in the low nibble (OCP Microscaling Formats v1.0, 2023). Both tensors may be other types
    of one byte: upstream's codes are int8, a checkpoint's scales uint8. Values are exact in BF16.
    """
    signed = (*_MAGNITUDES, *(-m for m in _MAGNITUDES))
    table = torch.tensor(signed, device=codes.device)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=-1)  # [256, 2], a byte
    values = F.embedding(codes.view(torch.uint8).int(), pairs)  # [..., O, I/2, 2]
    groups = values.flatten(-2).unflatten(-1, (-1, MXFP4_GROUP))
    return (groups * scale.view(torch.float8_e8m0fnu).float().unsqueeze(-1)).flatten(-2)
