"""Attention in blocks against one token at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mtp_graft.dsv4.windowed_attention import windowed_attention


def one_at_a_time(query: Tensor, kv: Tensor, sinks: Tensor, window: int) -> Tensor:
    """Return [T, H, D] for query [H, T, D] and the shared kv [T, D], in float64."""
    heads, tokens, size = query.shape
    out = torch.zeros(tokens, heads, size, dtype=torch.float64)
    for i in range(tokens):
        seen = range(max(0, i - window + 1), i + 1)
        for h in range(heads):
            logits = [float(query[h, i].double() @ kv[j].double()) / math.sqrt(size) for j in seen]
            total = sum(map(math.exp, logits)) + math.exp(float(sinks[h]))
            for j, logit in zip(seen, logits, strict=True):
                out[i, h] += math.exp(logit) / total * kv[j].double()
    return out


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 29])
def test_a_token_sees_itself_the_tokens_of_its_window_and_the_sink(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(2, 3, tokens, 16, generator=generator)  # two sequences, three heads
    kv = torch.randn(2, 1, tokens, 16, generator=generator)
    sinks = torch.randn(3, generator=generator)
    out, _ = windowed_attention(
        SimpleNamespace(), query, kv, kv, None, scaling=0.25, sliding_window=8, s_aux=sinks
    )
    assert out.shape == (2, tokens, 3, 16)
    for sequence in range(2):
        expected = one_at_a_time(query[sequence], kv[sequence, 0], sinks, window=8)
        torch.testing.assert_close(out[sequence].double(), expected, rtol=1e-5, atol=1e-6)


def test_far_tokens_do_not_matter_and_near_ones_do() -> None:
    generator = torch.Generator().manual_seed(0)
    query, kv = torch.randn(2, 1, 1, 40, 16, generator=generator)
    changed = kv.clone()
    changed[:, :, 20] += 1
    sinks = torch.zeros(1)
    first, second = (
        windowed_attention(
            SimpleNamespace(), query, t, t, None, scaling=0.25, sliding_window=8, s_aux=sinks
        )[0][0, :, 0]
        for t in (kv, changed)
    )
    differs = (first != second).any(dim=-1).nonzero().flatten().tolist()
    assert differs == list(range(20, 28))
