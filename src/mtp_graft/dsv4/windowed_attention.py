"""Sliding-window attention in blocks of one window: memory and time grow with T, not T squared.

Shape legend: B batch, H heads, T tokens, W window, N blocks of W tokens, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: Name under which transformers' layers find it.
NAME = "mtp_graft_windowed"


def windowed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int,
    s_aux: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the outputs [B, T, H, D] of attention to a token and the `sliding_window` - 1 before.

    `query` is [B, H, T, D]; `key` and `value` [B, 1, T, D] are the one head that all share;
    `s_aux` [H] are the sinks: logits that take part in the softmax and stand for nothing.
    Tokens are consecutive; a mask is not looked at. What transformers' eager attention gives
    under `head.sliding_window_mask`, up to rounding.
    """
    heads, tokens = query.shape[1:3]
    window = sliding_window
    padding = (0, 0, 0, -tokens % window)
    queries = F.pad(query, padding).unflatten(2, (-1, window))  # [B, H, N, W, D]
    queries = queries.permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B, N, H * W, D]
    keys, values = (_with_block_before(F.pad(t[:, 0], padding), window) for t in (key, value))
    logits = (queries @ keys.mT * scaling).unflatten(2, (heads, window))  # [B, N, H, W, 2 W]
    logits = logits.masked_fill(_hidden(logits.shape[1], window, logits.device), float("-inf"))
    sinks = s_aux.to(logits).view(1, 1, heads, 1, 1).expand(*logits.shape[:-1], 1)
    shares = torch.cat((logits, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    out = shares.flatten(2, 3) @ values  # [B, N, H * W, D]
    out = out.unflatten(2, (heads, window)).transpose(2, 3).flatten(1, 2)  # [B, N * W, H, D]
    return out[:, :tokens].contiguous(), None


def _with_block_before(tensor: Tensor, window: int) -> Tensor:
    """Return each block of `tensor` [B, N * W, D] after the block before it, [B, N, 2 W, D]."""
    blocks = tensor.unflatten(1, (-1, window))
    before = F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat((before, blocks), dim=2)


def _hidden(num_blocks: int, window: int, device: torch.device) -> Tensor:
    """Say which keys a query does not see, [N, 1, W, 2 W]: later ones, or a window before it."""
    key = torch.arange(2 * window, device=device) - window  # relative to the block's first token
    distance = torch.arange(window, device=device)[:, None] - key
    outside = (distance < 0) | (distance >= window)  # [W, 2 W]
    before_first = (torch.arange(num_blocks, device=device) == 0)[:, None, None] & (key < 0)
    return (outside | before_first).unsqueeze(1)


ALL_ATTENTION_FUNCTIONS.register(NAME, windowed_attention)
