"""FP8 (E4M3) in blocks of 128 x 128, one scale a block, as DeepSeek ships its linears.

Upstream scales are E8M0 (a power of two each); compressed-tensors' FP8_BLOCK has BF16 or F32
scales. A power of two is exact in both, so going from one to the other loses nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


def _blocks(weight: Tensor) -> Tensor:
    """View [O, I], zero-padded to whole blocks, as [O/128, 128, I/128, 128]."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))


def block_scale(weight: Tensor) -> Tensor:
    """Return the BF16 scales [ceil(O/128), ceil(I/128)] that map each block's absmax to 448."""
    scale = (_blocks(weight.float()).abs().amax(dim=(1, 3)) / FP8_MAX).to(torch.bfloat16)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def power_of_two_scale(weight: Tensor) -> Tensor:
    """Return E8M0 scales [ceil(O/128), ceil(I/128)]: the least power of two that fits a block."""
    absmax = _blocks(weight.float()).abs().amax(dim=(1, 3))
    # 448 is 0.875 * 2**9. Comparing mantissas is exact; a rounded log2 would miss by one there.
    mantissa, exponent = torch.frexp(absmax)
    exponent = (exponent - 9 + (mantissa > 0.875)).clamp(-127, 127)
    scale = torch.ldexp(torch.ones_like(absmax), exponent)
    return torch.where(absmax > 0, scale, torch.ones_like(absmax)).to(torch.float8_e8m0fnu)


def _expand(scale: Tensor, shape: torch.Size) -> Tensor:
    """Repeat block scales to one float32 value a weight, cut to `shape` [O, I]."""
    full = scale.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return full[: shape[0], : shape[1]]


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """Round `weight` [O, I] to FP8 codes for given block scales; values beyond 448 saturate."""
    scaled = weight.float() / _expand(scale, weight.shape)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weights [O, I] of FP8 codes and their block scales (any float type)."""
    return codes.float() * _expand(scale, codes.shape)
