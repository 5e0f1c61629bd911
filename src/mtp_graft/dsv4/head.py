"""The MTP head's forward pass in plain PyTorch, on transformers' DeepSeek-V4 layer.

Shape legend: B batch, T tokens, S hyper-connection streams, D hidden size, V vocabulary; in
attention H heads, d head size, W window, N blocks of W tokens.
Source: DeepSeek-V4's reference model; position handling as vLLM serves it.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
)

#: Name under which transformers' layers find `windowed_attention`.
_WINDOWED = "mtp_graft_windowed"


def one_layer_config(config: DeepseekV4Config) -> DeepseekV4Config:
    """Return the config under which transformers builds the head's layer.

    The head is one pure sliding-window layer with scored routing, at index 0: its real index,
    `num_hidden_layers`, is beyond what transformers' per-layer lists cover.
    """
    head = copy.deepcopy(config)
    head.num_hidden_layers = 1
    head.layer_types = ["sliding_attention"]
    head.mlp_layer_types = ["moe"]
    head._attn_implementation = _WINDOWED
    head._experts_implementation = "grouped_mm"  # sorts the tokens by expert
    return head


class MTPHead(nn.Module):
    """Predict token i+2 from the base's residual stream at token i and the embedding of token i+1.

    Parameters carry upstream's names, inside `layer` and `hc_head` transformers';
    `dsv4.names.head_from_module` translates. Embedding and LM head are the base model's.
    """

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        config = one_layer_config(config)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = DeepseekV4RMSNorm(size, eps=eps)
        self.hnorm = DeepseekV4RMSNorm(size, eps=eps)
        self.e_proj = nn.Linear(size, size, bias=False)
        self.h_proj = nn.Linear(size, size, bias=False)
        self.layer = DeepseekV4DecoderLayer(config, layer_idx=0)
        self.hc_head = DeepseekV4HyperHead(config)
        self.norm = DeepseekV4RMSNorm(size, eps=eps)
        self.rotary_emb = DeepseekV4RotaryEmbedding(config)  # buffers only, none in state_dict

    def forward(self, residual: Tensor, embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Return the head's own residual stream [B, T, S, D].

        `residual` [B, T, S, D] is the base's stream at tokens i, before its hc_head and final
        norm; `embeds` [B, T, D] are the embeddings of tokens i+1; `position_ids` [B, T] are i,
        consecutive. The result can stand in for the base's stream when drafting further tokens.
        """
        first = (position_ids == 0).unsqueeze(-1)
        embeds = embeds.masked_fill(first, 0.0)  # vLLM ignores the embedding at position 0
        streams = self.h_proj(self.hnorm(residual))  # [B, T, S, D]
        streams = streams + self.e_proj(self.enorm(embeds)).unsqueeze(2)
        rotary = self.rotary_emb(embeds, position_ids=position_ids, layer_type="main")
        residual_out: Tensor = self.layer(
            streams,
            position_embeddings={"main": rotary},
            position_ids=position_ids,
            attention_mask=None,
        )
        return residual_out

    def logits(self, residual_out: Tensor, lm_head_weight: Tensor) -> Tensor:
        """Return the logits [B, T, V] of tokens i+2, with the base's LM head [V, D]."""
        return F.linear(self.norm(self.hc_head(residual_out)), lm_head_weight)


def windowed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    scaling: float,
    sliding_window: int,
    s_aux: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the outputs [B, T, H, d] of attention to a token and the `sliding_window` - 1 before.

    `query` is [B, H, T, d]; `key` and `value` [B, 1, T, d] are the one head that all share;
    `s_aux` [H] are the sinks: logits that take part in the softmax and stand for nothing.
    Blocks of one window are computed at once: memory and time grow with T, not T squared.
    """
    heads, tokens, window = *query.shape[1:3], sliding_window
    after = -tokens % window
    queries = F.pad(query, (0, 0, 0, after)).unflatten(2, (-1, window))  # [B, H, N, W, d]
    queries = queries.permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B, N, H * W, d]
    # A block's queries see its own keys and those of the block before.
    around = (F.pad(t[:, 0], (0, 0, window, after)) for t in (key, value))
    keys, values = (t.unfold(1, 2 * window, window).mT.contiguous() for t in around)
    logits = (queries @ keys.mT * scaling).unflatten(2, (heads, window))  # [B, N, H, W, 2 W]
    first = window * torch.arange(logits.shape[1], device=query.device)[:, None, None, None]
    at = torch.arange(2 * window, device=query.device)
    q, k = first + at[:window, None], first + at - window  # positions [N, 1, W, 1], [N, 1, 1, 2 W]
    logits = logits.masked_fill((k < 0) | (k > q) | (k <= q - window), float("-inf"))
    sinks = s_aux.to(logits).view(1, 1, heads, 1, 1).expand(*logits.shape[:-1], 1)
    shares = torch.cat((logits, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    out = shares.flatten(2, 3) @ values  # [B, N, H * W, d]
    out = out.unflatten(2, (heads, window)).transpose(2, 3).flatten(1, 2)  # [B, N * W, H, d]
    return out[:, :tokens].contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_WINDOWED, windowed_attention)
