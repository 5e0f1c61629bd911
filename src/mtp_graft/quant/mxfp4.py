"""MXFP4: E2M1 codes, one E8M0 scale per 32 inputs (OCP Microscaling Formats v1.0, 2023).

A nibble is sign, two exponent bits and one mantissa bit; a byte holds two, the lower-indexed
input in the low nibble. DeepSeek-V4's routed experts are stored like this upstream.
"""

import torch
from torch import Tensor

GROUP = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weights [..., O, I] of packed codes [..., O, I/2] and E8M0 scales.

    Both may be other types of one byte: upstream's codes are int8, a checkpoint's scales uint8.
    Every value is exact in BF16 too.
    """
    table = torch.tensor((*MAGNITUDES, *(-m for m in MAGNITUDES)), device=codes.device)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=-1)  # [256, 2], a byte
    values = pairs[codes.view(torch.uint8).int()]  # [..., O, I/2, 2]
    groups = values.flatten(-2).unflatten(-1, (-1, GROUP))
    return (groups * scale.view(torch.float8_e8m0fnu).float().unsqueeze(-1)).flatten(-2)
