"""FP8 (E4M3) in blocks of 128 x 128, one scale a block, as DeepSeek ships its linears.

Upstream scales are E8M0 (a power of two each); compressed-tensors' FP8_BLOCK has BF16 or F32
scales. A power of two is exact in both, so going from one to the other loses nothing.
"""

from torch import Tensor

BLOCK = 128


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weights [O, I] of FP8 codes and their block scales (any float type)."""
    scales = scale.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return codes.float() * scales[: codes.shape[0], : codes.shape[1]]
