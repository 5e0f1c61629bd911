"""The DSpark drafter's forward pass in plain PyTorch, on transformers' DeepSeek-V4 layer.

It drafts a block in one pass: row 0 is the anchor, the newest token; the others are noise tokens.
Every row sees the block, and the context as the taps give it: the means over the base's streams
after some layers.

Shape legend: A anchors, each with a block of B rows, T tokens of context, L taps, S streams, D
hidden size, V vocabulary; in attention H heads, d head size, W window.
Source: DeepSeek-V4's reference model and vLLM 0.33; the method is in arXiv 2607.05147.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.dsv4.head import one_layer_config

#: Name under which transformers' layers find `block_attention`.
_BLOCK = "mtp_graft_block"

# What servers compute in float32, near ties of the router above all, is so under autocast, too.
_float32 = torch.autocast("cuda", enabled=False)


class _HyperConnection(modeling.DeepseekV4HyperConnection):  # type: ignore[misc]
    forward = _float32(modeling.DeepseekV4HyperConnection.forward)


class _HyperHead(modeling.DeepseekV4HyperHead):  # type: ignore[misc]
    forward = _float32(modeling.DeepseekV4HyperHead.forward)


class _Router(modeling.DeepseekV4TopKRouter):  # type: ignore[misc]
    forward = _float32(lambda self, x: modeling.DeepseekV4TopKRouter.forward(self, x.float()))


class _Experts(modeling.DeepseekV4Experts):  # type: ignore[misc]
    def forward(self, x: Tensor, *routing: Tensor) -> Tensor:
        """Compute in the weights' dtype."""
        return super().forward(x.to(self.down_proj.dtype), *routing).to(x.dtype)


class DSpark(nn.Module):
    """Predict the B tokens after an anchor from the base's taps at the tokens before it.

    Names are as in an `MTPHead`. Parameters are float32, the experts' perhaps BF16.
    """

    def __init__(self, config: DeepseekV4Config, stages: int) -> None:
        """Take the rank and the number of taps from upstream's `dspark_*` keys in `config`."""
        super().__init__()
        config = one_layer_config(config, _BLOCK)
        size, eps, rank = config.hidden_size, config.rms_norm_eps, config.dspark_markov_rank
        self.window: int = config.sliding_window
        self.noise: int = config.dspark_noise_token_id
        self.main_proj = nn.Linear(len(config.dspark_target_layer_ids) * size, size, bias=False)
        self.main_norm = modeling.DeepseekV4RMSNorm(size, eps=eps)
        self.stages = nn.ModuleList(_stage(config) for _ in range(stages))
        self.hc_head = _HyperHead(config)
        self.norm = modeling.DeepseekV4RMSNorm(size, eps=eps)
        w1, w2 = nn.Embedding(config.vocab_size, rank), nn.Linear(rank, config.vocab_size, False)
        self.markov_head = nn.ModuleDict({"markov_w1": w1, "markov_w2": w2})
        self.confidence_head = nn.ModuleDict({"proj": nn.Linear(size + rank, 1, bias=False)})
        # It has buffers only, none in state_dict.
        self.rotary_emb = modeling.DeepseekV4RotaryEmbedding(config)

    def context(self, taps: Tensor, positions: Tensor) -> list[Tensor]:
        """Return each stage's latents [T, d], keys and values at once, of taps [T, L, D]."""
        main, rotary = self.main_norm(self.main_proj(taps.flatten(1))), self._rotary(positions)
        attentions: list[Any] = [stage.self_attn for stage in self.stages]
        latents = [each.kv_norm(each.kv_proj(main))[:, None] for each in attentions]  # [T, 1, d]
        return [modeling.apply_rotary_pos_emb(each, *rotary)[:, 0] for each in latents]

    def forward(
        self, embeds: Tensor, context: Sequence[Tensor], anchors: Tensor, positions: Tensor
    ) -> Tensor:
        """Return what the blocks' rows say [A, B, D], before the norm.

        `embeds` [A, B, D] are those of `block_tokens`; `context` has each stage's latents [T, d] of
        texts one after the other, in which `anchors` [A] are the anchors' places, up to T, and
        `positions` [A] those in their texts. A block sees the W tokens of its text before it.
        """
        before = torch.arange(-self.window, 0, device=anchors.device)
        rows = (anchors[:, None] + before).clamp(min=0)  # [A, W]
        within = positions[:, None] + torch.arange(embeds.shape[1], device=anchors.device)  # [A, B]
        streams = embeds[:, :, None].repeat(1, 1, self.hc_head.hc_mult, 1)  # [A, B, S, D]
        given = {"position_embeddings": {"main": self._rotary(within)}, "position_ids": within}
        given["seen"] = positions[:, None] + before >= 0
        for stage, latents in zip(self.stages, context, strict=True):
            streams = stage(streams, **given, attention_mask=None, context=latents[rows])
        return self.hc_head(streams)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines in float32."""
        at = positions.reshape(1, -1)  # as all versions of transformers take it
        found = self.rotary_emb(at.float(), position_ids=at, layer_type="main")
        cos, sin = (each[0].unflatten(0, positions.shape) for each in found)
        return cos, sin

    def logits(self, hidden: Tensor, previous: Tensor, lm_head_weight: Tensor) -> Tensor:
        """Return the logits [A, B, V] of the rows' tokens, given the tokens before them [A, B]."""
        return F.linear(self.norm(hidden), lm_head_weight) + self._bias(previous)

    def _bias(self, previous: Tensor) -> Tensor:
        return self.markov_head["markov_w2"](self.markov_head["markov_w1"](previous))

    def confidence(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Return the logits [A, B] of a draft's acceptance, given that those before it were."""
        known = torch.cat((hidden, self.markov_head["markov_w1"](previous)), dim=-1)
        with _float32:
            return self.confidence_head["proj"](known.float()).squeeze(-1)

    def draft(self, hidden: Tensor, anchors: Tensor, lm_head_weight: Tensor) -> Tensor:
        """Return the drafts int64 [A, B] after anchors [A], token ids: each the likeliest."""
        drafts = [anchors]
        for unbiased in F.linear(self.norm(hidden), lm_head_weight).unbind(1):  # [A, V]
            drafts.append((unbiased + self._bias(drafts[-1])).argmax(-1))
        return torch.stack(drafts[1:], dim=1)


def block_tokens(anchors: Tensor, noise: int, rows: int) -> Tensor:
    """Return the token ids [A, B] of blocks of so many rows."""
    return F.pad(anchors[:, None], (0, rows - 1), value=noise)


def _stage(config: DeepseekV4Config) -> modeling.DeepseekV4DecoderLayer:
    layer = modeling.DeepseekV4DecoderLayer(config, layer_idx=0)
    layer.attn_hc, layer.ffn_hc = _HyperConnection(config), _HyperConnection(config)
    layer.mlp.gate, layer.mlp.experts = _Router(config), _Experts(config)
    return layer


def block_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    *_value_and_mask: Any,
    scaling: float,
    s_aux: Tensor,
    context: Tensor,
    seen: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the outputs [A, B, H, d] of attention to the context and to the whole block.

    `query` is [A, H, B, d]; `key` [A, 1, B, d], which is the value too, is the one head that all
    share, as is `context` [A, W, d], of which a block sees what `seen` bool [A, W] says; `s_aux`
    [H] are the sinks: logits that take part in the softmax and stand for nothing.
    """
    keys = torch.cat((context, key[:, 0]), dim=1)  # [A, W + B, d]
    logits = (query.flatten(1, 2) @ keys.mT * scaling).unflatten(1, query.shape[1:3])
    unseen = F.pad(~seen, (0, key.shape[2]))[:, None, None]
    logits = logits.masked_fill(unseen, float("-inf"))  # [A, H, B, W + B]
    sinks = s_aux.to(logits).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    shares = torch.cat((logits, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    out = (shares.flatten(1, 2) @ keys).unflatten(1, query.shape[1:3])  # [A, H, B, d]
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_BLOCK, block_attention)
