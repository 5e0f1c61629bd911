"""Symmetric INT4 in groups along the inputs, as compressed-tensors stores W4A16.

A weight is `code * scale`, the code in [-8, 7], one BF16 scale per group. Storage packs eight
codes into an int32, least significant nibble first, each with an offset of +8.
"""

import torch
from torch import Tensor

CODE_MIN, CODE_MAX = -8, 7
CODES_PER_WORD = 8
#: Shares of `group_scale` that `searched_scale` tries: 50/50, 49/50, ... 30/50.
SCALES_TRIED = 21


def group_scale(weight: Tensor, group_size: int) -> Tensor:
    """Return the BF16 scale of every group: absmax / 7.5, or 1 where a group is all zero.

    `weight` is [..., O, I] with I a multiple of `group_size`; the result is [..., O, G].
    7.5 is half of the 15 steps between the end codes, compressed-tensors' symmetric rule.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))  # [..., O, G, group_size]
    scale = (groups.abs().amax(dim=-1) / 7.5).to(torch.bfloat16)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def searched_scale(weight: Tensor, group_size: int, importance: Tensor) -> Tensor:
    """Return the BF16 scale of every group that rounds it with the least weighted squared error.

    `weight` is [B, O, I], `importance` [B, I] weighs the inputs' errors; the result is [B, O, G].
    Tried are `group_scale` and shares of it down to 0.6, in steps of 0.02: a smaller scale
    clips the largest weights and rounds all others finer. Of equal ones the largest is taken.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))  # [B, O, G, group_size]
    shares = importance.unflatten(-1, (-1, group_size)).unsqueeze(1)  # [B, 1, G, group_size]
    largest = group_scale(weight, group_size)
    best, least = largest, torch.full(largest.shape, torch.inf, device=weight.device)
    for tried in range(SCALES_TRIED):
        scale = (largest.float() * ((50 - tried) / 50)).to(torch.bfloat16)
        wide = scale.float().unsqueeze(-1)
        rounded = torch.round(groups / wide).clamp_(CODE_MIN, CODE_MAX)
        error = ((rounded * wide - groups).square_() * shares).sum(dim=-1)  # [B, O, G]
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """Round `weight` [..., O, I] to the nearest INT4 codes, int8 [..., O, I], for given scales."""
    groups = weight.float().unflatten(-1, (scale.shape[-1], -1))
    codes = torch.round(groups / scale.float().unsqueeze(-1))
    return codes.clamp(CODE_MIN, CODE_MAX).to(torch.int8).flatten(-2)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weights [..., O, I] that `codes` and `scale` [..., O, G] stand for."""
    groups = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.float().unsqueeze(-1)).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """Pack int8 codes [..., O, I] into int32 words [..., O, I/8]."""
    nibbles = (codes - CODE_MIN).view(torch.uint8).unflatten(-1, (-1, 2))  # [..., O, I/2, 2]
    low, high = nibbles.unbind(-1)
    pairs = (low | (high << 4)).contiguous()  # [..., O, I/2]
    return pairs.view(torch.int32)  # a word's first byte is its least significant


def unpack(words: Tensor) -> Tensor:
    """Undo `pack`: int32 words [..., O, I/8] to int8 codes [..., O, I]."""
    pairs = words.contiguous().view(torch.uint8)  # [..., O, I/2]
    nibbles = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(-2)
    return nibbles.view(torch.int8) + CODE_MIN
