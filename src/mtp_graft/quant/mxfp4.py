"""MXFP4: E2M1 codes, one E8M0 scale per 32 inputs (OCP Microscaling Formats v1.0, 2023).

A nibble is sign, two exponent bits and one mantissa bit; a byte holds two, the lower-indexed
input in the low nibble. DeepSeek-V4's routed experts are stored like this upstream.
"""

import torch
from torch import Tensor

GROUP = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MAX_EXPONENT = 2  # of E2M1: 6 = 1.5 * 2**2


def group_scale(weight: Tensor) -> Tensor:
    """Return E8M0 scales [..., O, I/32]: 2 ** (floor(log2(absmax)) - 2), the standard's rule."""
    absmax = weight.float().unflatten(-1, (-1, GROUP)).abs().amax(dim=-1)
    exponent = torch.frexp(absmax).exponent - 1 - _MAX_EXPONENT
    scale = torch.ldexp(torch.ones_like(absmax), exponent.clamp(-127, 127))
    return torch.where(absmax > 0, scale, torch.ones_like(absmax)).to(torch.float8_e8m0fnu)


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """Round `weight` [..., O, I] to packed E2M1 codes, uint8 [..., O, I/2]; beyond 6 saturates.

    Ties go to the even code, as IEEE rounding does.
    """
    groups = weight.float().unflatten(-1, (-1, GROUP)) / scale.float().unsqueeze(-1)
    values = groups.flatten(-2)  # [..., O, I]
    magnitude = values.abs()
    table = torch.tensor(MAGNITUDES, device=weight.device)
    middle = (table[1:] + table[:-1]) / 2
    above = torch.bucketize(magnitude, middle, right=True)  # a tie counts as above
    tie = magnitude == middle[(above - 1).clamp(min=0)]
    code = above - (tie & (above % 2 == 1)).long()
    nibbles = (code | (torch.signbit(values).long() << 3)).to(torch.uint8)
    low, high = nibbles.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weights [..., O, I] of packed codes [..., O, I/2] and E8M0 scales.

    Codes may be uint8 or, as upstream stores them, int8 of the same bits. Every value is exact
    in BF16 too.
    """
    table = torch.tensor((*MAGNITUDES, *(-m for m in MAGNITUDES)), device=codes.device)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=-1)  # [256, 2], a byte
    values = pairs[codes.view(torch.uint8).int()]  # [..., O, I/2, 2]
    groups = values.flatten(-2).unflatten(-1, (-1, GROUP))
    return (groups * scale.float().unsqueeze(-1)).flatten(-2)
