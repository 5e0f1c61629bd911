"""The head's forward pass against a slow reference: loops, float64, one token at a time."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.dsv4.head import MTPHead

WINDOW = 4


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> DeepseekV4Config:
    settings = json.loads((tiny_model / "make" / "config.json").read_text())
    settings |= {"hidden_size": 64, "q_lora_rank": 32, "o_lora_rank": 16, "head_dim": 128}
    settings |= {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2}
    return DeepseekV4Config(**settings | {"sliding_window": WINDOW, "vocab_size": 50})


@pytest.fixture(scope="module")
def head(config: DeepseekV4Config) -> MTPHead:
    torch.manual_seed(3)
    head = MTPHead(config).eval()
    for name, tensor in head.state_dict().items():
        # Nothing is left at a neutral value: norms, sinks, biases and scales all matter.
        noise = torch.randn(tensor.shape) / math.sqrt(max(tensor.shape[-1], 1))
        tensor.copy_(1 + noise if "norm" in name or name.endswith("scale") else noise)
        if "gate_up_proj" in name or "gate_proj" in name or ".up_proj" in name:
            tensor.mul_(12)  # so large that the clamp at 10 binds
    return head


def rms_norm(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + 1e-6) * weight


def rotate(x: Tensor, position: int) -> Tensor:
    """Rotate the last 64 entries of `x` pairwise; a negative position rotates back."""
    x = x.clone()
    for pair in range(32):
        angle, first = position * 10000.0 ** (-2 * pair / 64), len(x) - 64 + 2 * pair
        a, b = x[first].item(), x[first + 1].item()
        x[first] = a * math.cos(angle) - b * math.sin(angle)
        x[first + 1] = a * math.sin(angle) + b * math.cos(angle)
    return x


class Reference:
    """The head in float64, written from the format's description."""

    def __init__(self, head: MTPHead, config: DeepseekV4Config) -> None:
        self.w = {n.removeprefix("layer."): t.double() for n, t in head.state_dict().items()}
        self.c = config
        self.clamped = 0

    def mixing(self, streams: Tensor, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return pre [4], post [4], comb [4, 4] for one token's streams [4, D]."""
        mixes = self.w[f"{prefix}.fn"] @ rms_norm(streams.flatten())
        base, scale = self.w[f"{prefix}.base"], self.w[f"{prefix}.scale"]
        pre = torch.sigmoid(mixes[:4] * scale[0] + base[:4]) + 1e-6
        post = 2 * torch.sigmoid(mixes[4:8] * scale[1] + base[4:8])
        comb = torch.softmax((mixes[8:] * scale[2] + base[8:]).view(4, 4), dim=1) + 1e-6
        for iteration in range(20):
            if iteration > 0:
                comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
            comb = comb / (comb.sum(0, keepdim=True) + 1e-6)
        return pre, post, comb

    def around(
        self, streams: Tensor, prefix: str, norm: str, block: Callable[[list[Tensor]], list[Tensor]]
    ) -> Tensor:
        """Run `block` on the mixed-down, normed streams [T, 4, D] and write its output back."""
        mixes = [self.mixing(token, prefix) for token in streams]
        mixed = [pre @ token for (pre, _, _), token in zip(mixes, streams, strict=True)]
        outputs = block([rms_norm(x, self.w[norm]) for x in mixed])
        result = torch.zeros_like(streams)
        for t, (_, post, comb) in enumerate(mixes):
            for k in range(4):
                kept = sum(comb[j, k] * streams[t, j] for j in range(4))
                result[t, k] = post[k] * outputs[t] + kept
        return result

    def attention(self, inputs: list[Tensor]) -> list[Tensor]:
        w = {name.removeprefix("self_attn."): tensor for name, tensor in self.w.items()}
        dim, num_heads, groups = self.c.head_dim, self.c.num_attention_heads, self.c.o_groups
        keys = [
            rotate(rms_norm(w["kv_proj.weight"] @ x, w["kv_norm.weight"]), t)
            for t, x in enumerate(inputs)
        ]
        outputs = []
        for t, x in enumerate(inputs):
            q = w["q_b_proj.weight"] @ rms_norm(w["q_a_proj.weight"] @ x, w["q_a_norm.weight"])
            heads = []
            for h in range(num_heads):
                query = rotate(rms_norm(q[h * dim : (h + 1) * dim]), t)
                visible = keys[max(0, t - WINDOW + 1) : t + 1]
                scores = [math.exp(float(query @ key) / math.sqrt(dim)) for key in visible]
                total = sum(scores) + math.exp(float(w["sinks"][h]))
                mean = sum(p / total * key for p, key in zip(scores, visible, strict=True))
                heads.append(rotate(mean, -t))
            parts = zip(
                w["o_a_proj.weight"].chunk(groups), torch.cat(heads).chunk(groups), strict=True
            )
            outputs.append(w["o_b_proj.weight"] @ torch.cat([wo @ o for wo, o in parts]))
        return outputs

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        gate, up = w1 @ x, w3 @ x
        self.clamped += int((gate > 10).sum() + (up.abs() > 10).sum())
        gate, up = gate.clamp(max=10), up.clamp(-10, 10)
        return w2 @ (gate * torch.sigmoid(gate) * up)

    def experts(self, inputs: list[Tensor]) -> list[Tensor]:
        w = {name.removeprefix("mlp."): tensor for name, tensor in self.w.items()}
        outputs = []
        for x in inputs:
            scores = torch.sqrt(torch.log1p(torch.exp(w["gate.weight"] @ x)))
            biased = (scores + w["gate.e_score_correction_bias"]).tolist()
            chosen = sorted(range(len(biased)), key=lambda e: -biased[e])[:2]
            shared = (w[f"shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down"))
            out = self.expert(x, *shared)
            for e in chosen:
                w1, w3 = w["experts.gate_up_proj"][e].chunk(2)
                routed = self.expert(x, w1, w3, w["experts.down_proj"][e])
                out = out + 1.5 * scores[e] / scores[chosen].sum() * routed
            outputs.append(out)
        return outputs

    def forward(self, residual: Tensor, embeds: Tensor) -> Tensor:
        """Return the residual stream [T, 4, D] for one sequence from position 0."""
        w = self.w
        streams = torch.zeros_like(residual)
        for t, token in enumerate(residual):
            embed = rms_norm(embeds[t] if t > 0 else 0 * embeds[t], w["enorm.weight"])
            for k in range(4):
                streams[t, k] = w["h_proj.weight"] @ rms_norm(token[k], w["hnorm.weight"])
                streams[t, k] += w["e_proj.weight"] @ embed
        streams = self.around(streams, "attn_hc", "input_layernorm.weight", self.attention)
        return self.around(streams, "ffn_hc", "post_attention_layernorm.weight", self.experts)

    def logits(self, streams: Tensor, lm_head: Tensor) -> Tensor:
        rows = []
        for token in streams:
            mixes = self.w["hc_head.hc_fn"] @ rms_norm(token.flatten())
            pre = torch.sigmoid(mixes * self.w["hc_head.hc_scale"] + self.w["hc_head.hc_base"])
            rows.append(lm_head @ rms_norm((pre + 1e-6) @ token, self.w["norm.weight"]))
        return torch.stack(rows)


def inputs_of(config: DeepseekV4Config, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    residual = 2 * torch.randn(2, tokens, 4, config.hidden_size, generator=generator)
    embeds = torch.randn(2, tokens, config.hidden_size, generator=generator)
    return residual, embeds, torch.arange(tokens).expand(2, -1)


@pytest.mark.parametrize("tokens", [1, WINDOW, WINDOW + 1, 11])
def test_head_agrees_with_the_loop_reference(
    tokens: int, head: MTPHead, config: DeepseekV4Config
) -> None:
    residual, embeds, positions = inputs_of(config, tokens)
    lm_head = torch.randn(config.vocab_size, config.hidden_size) / 8
    reference = Reference(head, config)
    with torch.no_grad():
        out = head(residual, embeds, positions)
        logits = head.logits(out, lm_head)
    for b in range(2):
        expected = reference.forward(residual[b].double(), embeds[b].double())
        torch.testing.assert_close(out[b].double(), expected, rtol=1e-4, atol=1e-4)
        expected_logits = reference.logits(expected, lm_head.double())
        torch.testing.assert_close(logits[b].double(), expected_logits, rtol=1e-4, atol=1e-4)
    assert reference.clamped > 10 * tokens, "the clamp at 10 has to bind for this test to see it"


def test_only_at_position_zero_the_embedding_is_ignored(
    head: MTPHead, config: DeepseekV4Config
) -> None:
    residual, embeds, positions = inputs_of(config, 3)
    other = embeds.clone()
    other[:, 0] = 7.0
    with torch.no_grad():
        assert torch.equal(head(residual, embeds, positions), head(residual, other, positions))
        later = positions + 5
        assert not torch.equal(head(residual, embeds, later), head(residual, other, later))
