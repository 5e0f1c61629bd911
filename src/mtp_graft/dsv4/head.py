"""The MTP head's forward pass in plain PyTorch, on transformers' DeepSeek-V4 layer.

Shape legend: B batch, T tokens, S hyper-connection streams, D hidden size, V vocabulary; in
attention H heads, d head size, W window, N blocks of W tokens, J drafts after the first.
Source: DeepSeek-V4's reference model; position handling as vLLM serves it.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

#: Name under which transformers' layers find `windowed_attention`.
_WINDOWED = "mtp_graft_windowed"


def one_layer_config(config: DeepseekV4Config, attention: str = _WINDOWED) -> DeepseekV4Config:
    """Return the config under which transformers builds a drafter's layer.

    It is one pure sliding-window layer with scored routing, at index 0: its real index is beyond
    what transformers' per-layer lists cover. `attention` is the name of its function there.
    """
    head = copy.deepcopy(config)
    head.num_hidden_layers = 1
    head.layer_types = ["sliding_attention"]
    head.mlp_layer_types = ["moe"]
    head._attn_implementation = attention
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
        self.enorm = modeling.DeepseekV4RMSNorm(size, eps=eps)
        self.hnorm = modeling.DeepseekV4RMSNorm(size, eps=eps)
        self.e_proj = nn.Linear(size, size, bias=False)
        self.h_proj = nn.Linear(size, size, bias=False)
        self.layer = modeling.DeepseekV4DecoderLayer(config, layer_idx=0)
        self.hc_head = modeling.DeepseekV4HyperHead(config)
        self.norm = modeling.DeepseekV4RMSNorm(size, eps=eps)
        # It has buffers only, none in state_dict.
        self.rotary_emb = modeling.DeepseekV4RotaryEmbedding(config)

    def forward(
        self, residual: Tensor, embeds: Tensor, positions: Tensor, keys: list[Tensor] | None = None
    ) -> Tensor:
        """Return the head's own residual stream [B, T, S, D].

        `residual` [B, T, S, D] is the base's stream at tokens i, before its hc_head and final
        norm; `embeds` [B, T, D] are the embeddings of tokens i+1; `positions` [B, T] are i,
        consecutive. For draft j after the first of a step, `residual` is the result for draft
        j - 1, embeddings and positions are j later, and `keys` are those of the drafts before, as
        calls with the same list have left them there: it is empty for the first draft.
        """
        first = (positions == 0).unsqueeze(-1)
        embeds = embeds.masked_fill(first, 0.0)  # vLLM ignores the embedding at position 0
        streams = self.h_proj(self.hnorm(residual))  # [B, T, S, D]
        streams = streams + self.e_proj(self.enorm(embeds)).unsqueeze(2)
        rotary = self.rotary_emb(embeds, position_ids=positions, layer_type="main")
        given = {"position_embeddings": {"main": rotary}, "position_ids": positions}
        return self.layer(streams, **given, attention_mask=None, keys=keys)

    def logits(self, residual_out: Tensor, lm_head_weight: Tensor) -> Tensor:
        """Return the logits [B, T, V] of tokens i+2, with the base's LM head [V, D]."""
        return F.linear(self.norm(self.hc_head(residual_out)), lm_head_weight)


def windowed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    *_value_and_mask: Any,
    scaling: float,
    sliding_window: int,
    s_aux: Tensor,
    keys: list[Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the outputs [B, T, H, d] of attention to a token and the `sliding_window` - 1 before.

    `query` is [B, H, T, d]; `key` [B, 1, T, d], which is the value too, is the one head that all
    share; `s_aux` [H] are the sinks: logits that take part in the softmax and stand for nothing.
    `keys` are those of a step's earlier drafts, to which `key` is added: a draft sees them and what
    the first one saw. Blocks of one window are computed at once, or time would grow with T squared.
    """
    keys = [] if keys is None else keys
    keys.append(key)
    (verified, *own), (heads, tokens), window = keys, query.shape[1:3], sliding_window
    after = -tokens % window

    def blocks(x: Tensor) -> Tensor:  # [B, H, T, ...] to [B, N, H, W, ...]
        padded = F.pad(x, (*(0, 0) * (x.dim() - 3), 0, after))
        return padded.unflatten(2, (-1, window)).transpose(1, 2)

    # A block's queries see its own keys and those of the block before.
    around = F.pad(verified[:, 0], (0, 0, window, after))
    around = around.unfold(1, 2 * window, window).mT.contiguous()  # [B, N, 2 W, d]
    logits = blocks(query).flatten(2, 3) @ around.mT * scaling
    logits = logits.unflatten(2, (heads, window))  # [B, N, H, W, 2 W]
    first = window * torch.arange(logits.shape[1], device=query.device)[:, None, None, None]
    at = torch.arange(2 * window, device=query.device)
    q, k = first + at[:window, None], first + at - window  # rows [N, 1, W, 1], [N, 1, 1, 2 W]
    unseen = (k < 0) | (k > q) | (k <= q + len(own) - window)
    logits = logits.masked_fill(unseen, float("-inf"))
    scores = ((query * each).sum(-1, keepdim=True) * scaling for each in own)  # [B, H, T, 1]
    sinks = s_aux.to(logits).view(1, 1, heads, 1, 1).expand(*logits.shape[:-1], 1)
    shares = torch.cat((logits, *map(blocks, scores), sinks), dim=-1).softmax(dim=-1)
    out = shares[..., : 2 * window].flatten(2, 3) @ around  # [B, N, H * W, d]
    out = out.unflatten(2, (heads, window)).transpose(2, 3).flatten(1, 2)  # [B, N * W, H, d]
    for j, each in enumerate(own, start=2 * window):
        share = shares[..., j].transpose(2, 3).flatten(1, 2)  # [B, N * W, H]
        out = out + share[..., None] * F.pad(each, (0, 0, 0, after)).transpose(1, 2)
    return out[:, :tokens].contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_WINDOWED, windowed_attention)
