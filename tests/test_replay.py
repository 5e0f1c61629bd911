"""The replay against the head called directly, its inputs shifted by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.names import head_from_module
from mtp_graft.dsv4.replay import build_head, model_config, replay_drafts, replay_routing, unroll
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.errors import GraftError

TOKENS = 150  # more than the sliding window of 128


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> DeepseekV4Config:
    return model_config(json.loads((tiny_model / "base" / "config.json").read_text()))


@pytest.fixture(scope="module")
def decoded(tiny_model: Path) -> dict[str, Tensor]:
    return decode_head(load_tensors(tiny_model / "upstream"))


@pytest.fixture(scope="module")
def head(config: DeepseekV4Config, decoded: dict[str, Tensor]) -> MTPHead:
    return build_head(config, decoded)


def sequence(config: DeepseekV4Config, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return residual [T, S, D], embeddings [T, D] and an LM head [V, D]."""
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(TOKENS, config.hc_mult, config.hidden_size, generator=generator)
    embeds = torch.randn(TOKENS, config.hidden_size, generator=generator)
    return residual, embeds, torch.randn(300, config.hidden_size, generator=generator)


def shifted(residual: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pair token i with the embedding of token i + 1, by hand."""
    rows = range(TOKENS - 1)
    pairs = [(residual[i], embeds[i + 1]) for i in rows]
    streams, next_embeds = (torch.stack(tensors)[None] for tensors in zip(*pairs, strict=True))
    return streams, next_embeds, torch.tensor([list(rows)])


def test_a_built_head_has_every_tensor(head: MTPHead, decoded: dict[str, Tensor]) -> None:
    found = head_from_module(head.state_dict())
    assert found.keys() == decoded.keys()
    assert all(torch.equal(found[name], decoded[name]) for name in decoded)


def test_drafts_are_the_argmax_of_the_heads_logits(config: DeepseekV4Config, head: MTPHead) -> None:
    residual, embeds, lm_head = sequence(config, seed=0)
    with torch.no_grad():
        logits = head.logits(head(*shifted(residual, embeds)), lm_head)[0]  # [T - 1, V]
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4, "a near tie: choose another seed"
    best, given = logits.argmax(-1)[:, None].tolist(), (residual[None], embeds[None])
    assert replay_drafts(head, lm_head, *given).tolist() == [best]
    assert replay_drafts(head, lm_head, *given, start=40).tolist() == [best[40:]]


def test_further_drafts_are_those_of_a_server(config: DeepseekV4Config, head: MTPHead) -> None:
    """The oracle computes one step at a time, all keys anew: the verified ones and its own."""
    residual, embeds, lm_head = sequence(config, seed=3)
    with torch.no_grad():
        unrolled = list(unroll(head, residual[None], embeds[None], 5))
    for i in (0, 1, 57, 126, 127, 128, TOKENS - 6):
        stream = residual[None, : i + 1]
        for found in unrolled:
            rows = torch.arange(stream.shape[1])[None]
            with torch.no_grad():
                out = head(stream, embeds[None, 1 : 1 + rows.shape[1]], rows)[:, -1:]
            torch.testing.assert_close(found[:, i : i + 1], out, rtol=0, atol=1e-3)
            stream = torch.cat((stream, out), dim=1)
    drafts = replay_drafts(head, lm_head, residual[None], embeds[None], start=9, k=5)[0]
    guesses = [head.logits(each[:, 9:], lm_head)[0].argmax(-1) for each in unrolled]
    assert torch.equal(drafts, torch.stack(guesses, dim=-1))


def test_same_routing(config: DeepseekV4Config, decoded: dict[str, Tensor], head: MTPHead) -> None:
    residual, embeds, _ = sequence(config, seed=1)
    seen: list[Tensor] = []
    hook = head.layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.extend(args[:2]))
    with torch.no_grad():
        head(*shifted(residual, embeds))
    hook.remove()
    others = {name: tensor for name, tensor in decoded.items() if ".experts." not in name}
    alone = build_head(config, others, with_experts=False)
    routed_x, experts, _ = replay_routing(alone, residual, embeds)
    x, chosen = seen
    torch.testing.assert_close(routed_x, x, rtol=1e-5, atol=1e-5)
    assert experts.tolist() == chosen.sort(-1).values.tolist()


def test_a_head_of_nan_is_an_error(config: DeepseekV4Config, decoded: dict[str, Tensor]) -> None:
    residual, embeds, lm_head = sequence(config, seed=4)
    broken = {**decoded, "mtp.0.enorm.weight": torch.full((config.hidden_size,), math.nan)}
    with pytest.raises(GraftError, match="not finite"):
        replay_drafts(build_head(config, broken), lm_head, residual[None], embeds[None])
