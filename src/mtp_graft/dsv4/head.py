"""The MTP head's forward pass in plain PyTorch, on transformers' DeepSeek-V4 layer.

Shape legend: B batch, T tokens, H hyper-connection streams (4), D hidden size, V vocabulary.
Source: DeepSeek-V4's reference model; position handling as vLLM serves it.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
)

from mtp_graft.dsv4 import windowed_attention


def one_layer_config(
    config: DeepseekV4Config, experts_implementation: str = "eager", attention: str = "eager"
) -> DeepseekV4Config:
    """Return the config under which transformers builds the head's layer.

    The head is one pure sliding-window layer with scored routing, at index 0: its real index,
    `num_hidden_layers`, is beyond what transformers' per-layer lists cover.
    """
    head = copy.deepcopy(config)
    head.num_hidden_layers = 1
    head.layer_types = ["sliding_attention"]
    head.mlp_layer_types = ["moe"]
    head._attn_implementation = attention
    head._experts_implementation = experts_implementation
    return head


def sliding_window_mask(position_ids: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [B, 1, T, T]: a token sees itself and the `window - 1` before it."""
    distance = position_ids[:, :, None] - position_ids[:, None, :]  # [B, T query, T key]
    visible = (distance >= 0) & (distance < window)
    mask = torch.zeros(visible.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill(~visible, float("-inf")).unsqueeze(1)


class MTPHead(nn.Module):
    """Predict token i+2 from the base's residual stream at token i and the embedding of token i+1.

    Parameters carry the names of the upstream tensors (`enorm`, `hnorm`, `e_proj`, `h_proj`,
    `norm`), `layer` and `hc_head` those of transformers inside; `dsv4.names.head_from_module`
    translates. Embedding and LM head are the base model's. The weights are uninitialized.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        experts_implementation: str = "eager",
        attention: str = "eager",  # not sdpa, which would drop the attention sinks
    ) -> None:
        super().__init__()
        config = one_layer_config(config, experts_implementation, attention)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.sliding_window: int = config.sliding_window
        self.attention = attention
        self.enorm = DeepseekV4RMSNorm(size, eps=eps)
        self.hnorm = DeepseekV4RMSNorm(size, eps=eps)
        self.e_proj = nn.Linear(size, size, bias=False)
        self.h_proj = nn.Linear(size, size, bias=False)
        self.layer = DeepseekV4DecoderLayer(config, layer_idx=0)
        self.hc_head = DeepseekV4HyperHead(config)
        self.norm = DeepseekV4RMSNorm(size, eps=eps)
        self.rotary_emb = DeepseekV4RotaryEmbedding(config)  # buffers only, none in state_dict

    def forward(self, residual: Tensor, embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Return the head's own residual stream [B, T, H, D].

        `residual` [B, T, H, D] is the base's stream at tokens i, before its hc_head and final
        norm; `embeds` [B, T, D] are the embeddings of tokens i+1; `position_ids` [B, T] are i,
        unshifted. The result can stand in for the base's stream when drafting further tokens.
        """
        first = (position_ids == 0).unsqueeze(-1)
        embeds = embeds.masked_fill(first, 0.0)  # vLLM ignores the embedding at position 0
        streams = self.h_proj(self.hnorm(residual))  # [B, T, H, D]
        streams = streams + self.e_proj(self.enorm(embeds)).unsqueeze(2)
        rotary = self.rotary_emb(embeds, position_ids=position_ids, layer_type="main")
        mask = None  # what windowed attention needs none of
        if self.attention != windowed_attention.NAME:
            mask = sliding_window_mask(position_ids, self.sliding_window, streams.dtype)
        residual_out: Tensor = self.layer(
            streams,
            position_embeddings={"main": rotary},
            position_ids=position_ids,
            attention_mask=mask,
        )
        return residual_out

    def logits(self, residual_out: Tensor, lm_head_weight: Tensor) -> Tensor:
        """Return the logits [B, T, V] of tokens i+2, with the base's LM head [V, D]."""
        return F.linear(self.norm(self.hc_head(residual_out)), lm_head_weight)
