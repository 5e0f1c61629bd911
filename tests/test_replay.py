"""The replay against the head called directly, and against loops for what it captures."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.replay import (
    build_head,
    model_config,
    replay_drafts,
    replay_routing,
)
from mtp_graft.dsv4.variants import decode_head, is_expert
from mtp_graft.errors import GraftError

TOKENS = 150  # more than the sliding window of 128


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> DeepseekV4Config:
    return model_config(json.loads((tiny_model / "base" / "config.json").read_text()))


@pytest.fixture(scope="module")
def decoded(tiny_model: Path) -> dict[str, Tensor]:
    return decode_head(load_tensors(tiny_model / "upstream"))


@pytest.fixture(scope="module")
def not_experts(decoded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in decoded.items() if not is_expert(n.removesuffix(".weight"))}


@pytest.fixture(scope="module")
def eager_head(config: DeepseekV4Config, decoded: dict[str, Tensor]) -> MTPHead:
    """The head built the ordinary way: allocated, then filled by joining what names split."""
    head = MTPHead(config, "eager").eval()
    native = {name: names.head_from_module({name: t}) for name, t in head.state_dict().items()}
    state = {}
    for name, parts in native.items():
        tensors = [decoded[part] for part in parts]
        if name.endswith("experts.gate_up_proj"):
            pairs = zip(tensors[::2], tensors[1::2], strict=True)
            state[name] = torch.stack([torch.cat(pair) for pair in pairs])
        else:
            fused = name.endswith("experts.down_proj")
            state[name] = torch.stack(tensors) if fused else tensors[0]
    head.load_state_dict(state)
    return head


def sequence(config: DeepseekV4Config, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return residual [T, S, D], embeddings [T, D] and an LM head [V, D]."""
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(TOKENS, config.hc_mult, config.hidden_size, generator=generator)
    embeds = torch.randn(TOKENS, config.hidden_size, generator=generator)
    return residual, embeds, torch.randn(300, config.hidden_size, generator=generator)


def shifted(residual: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pair row i with the embedding of token i + 1, by hand."""
    rows = range(TOKENS - 1)
    return (
        torch.stack([residual[i] for i in rows])[None],
        torch.stack([embeds[i + 1] for i in rows])[None],
        torch.tensor([list(rows)]),
    )


def test_drafts_are_the_argmax_of_the_heads_logits(
    config: DeepseekV4Config, decoded: dict[str, Tensor], eager_head: MTPHead
) -> None:
    residual, embeds, lm_head = sequence(config, seed=0)
    with torch.no_grad():
        out = eager_head(*shifted(residual, embeds))
        logits = eager_head.logits(out, lm_head)[0]  # [T - 1, V]
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4, "a near tie: choose another seed"
    head = build_head(config, decoded)
    assert replay_drafts(head, lm_head, residual, embeds).tolist() == logits.argmax(-1).tolist()
    late = replay_drafts(head, lm_head, residual, embeds, start=40)
    assert late.tolist() == logits.argmax(-1).tolist()[40:]


def test_routing_is_that_of_the_whole_head(
    config: DeepseekV4Config, not_experts: dict[str, Tensor], eager_head: MTPHead
) -> None:
    residual, embeds, _ = sequence(config, seed=1)
    seen: list[Tensor] = []
    experts = eager_head.layer.mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, args: seen.extend(args[:2]))
    with torch.no_grad():
        eager_head(*shifted(residual, embeds))
    hook.remove()
    routed = replay_routing(build_head(config, not_experts, with_experts=False), residual, embeds)
    x, chosen = seen
    torch.testing.assert_close(routed.x, x, rtol=1e-5, atol=1e-5)
    assert routed.experts.tolist() == chosen.sort(-1).values.tolist()


def test_router_chooses_the_largest_biased_scores(
    config: DeepseekV4Config, not_experts: dict[str, Tensor]
) -> None:
    tensors = dict(not_experts)
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(config.n_routed_experts, generator=generator)
    tensors["mtp.0.ffn.gate.bias"] = bias
    residual, embeds, _ = sequence(config, seed=2)
    routed = replay_routing(build_head(config, tensors, with_experts=False), residual, embeds)
    assert len(routed.x) == TOKENS - 1
    gate = tensors["mtp.0.ffn.gate.weight"].double()
    for x, chosen in zip(routed.x.double(), routed.experts.tolist(), strict=True):
        scores = torch.log1p(torch.exp(gate @ x)).sqrt() + bias.double()
        ranked = sorted(range(len(scores)), key=lambda e: -scores[e])
        assert sorted(ranked[: config.num_experts_per_tok]) == chosen


def test_missing_unexpected_and_misshapen_tensors_are_named(
    config: DeepseekV4Config, decoded: dict[str, Tensor]
) -> None:
    name = "mtp.0.ffn.experts.7.w1.weight"
    with pytest.raises(GraftError, match=rf"{name}: missing"):
        build_head(config, {n: t for n, t in decoded.items() if n != name})
    with pytest.raises(GraftError, match=r"mtp\.0\.emb\.weight: not a tensor"):
        build_head(config, {**decoded, "mtp.0.emb.weight": torch.zeros(1)})
    with pytest.raises(GraftError, match=rf"{name}: is \[2, 2\], expected \[256, 256\]"):
        build_head(config, {**decoded, name: torch.zeros(2, 2)})


def test_upstream_without_a_head_or_with_three_blocks_is_refused() -> None:
    with pytest.raises(GraftError, match=r"has no mtp\.\* tensors"):
        names.upstream_head_names(["layers.0.attn.wq_a.weight"], "upstream")
    with pytest.raises(GraftError, match="DSpark"):
        names.upstream_head_names([f"mtp.{i}.norm.weight" for i in range(3)], "upstream")


def test_head_that_gives_nan_is_an_error(
    config: DeepseekV4Config, decoded: dict[str, Tensor]
) -> None:
    residual, embeds, lm_head = sequence(config, seed=4)
    broken = {**decoded, "mtp.0.enorm.weight": torch.full((config.hidden_size,), math.nan)}
    with pytest.raises(GraftError, match="not finite"):
        replay_drafts(build_head(config, broken), lm_head, residual, embeds)
