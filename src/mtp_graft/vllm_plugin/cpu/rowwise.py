"""A token's value must not depend on the tokens computed beside it.

Speculation verifies several tokens in one step. A matrix product of one row and of several can sum
in different orders, and the last bits decide ties: greedy output would depend on speculation. Steps
of up to `MAX_DECODE_TOKENS` tokens are therefore computed one row at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

#: A verification step has at most this many tokens: eight requests with k = 3, say.
MAX_DECODE_TOKENS = 32


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x` [T, I] times `weight` [O, I], transposed; row by row if T is small."""
    if x.shape[0] > MAX_DECODE_TOKENS:
        return F.linear(x, weight)
    out = x.new_empty(x.shape[0], weight.shape[0])  # [T, O]
    for row, result in zip(x, out, strict=True):
        torch.mv(weight, row, out=result)
    return out
