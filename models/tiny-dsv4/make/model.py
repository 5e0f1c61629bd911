"""The model in training: transformers' DeepSeek-V4 and the MTP head, run with substituted weights.

Shape legend: B batch, T tokens, H hyper-connection streams, D hidden size, V vocabulary, E experts.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import fake_quant
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4ForCausalLM,
    DeepseekV4Indexer,
    DeepseekV4TopKRouter,
)

from mtp_graft.dsv4.head import MTPHead

Weights = dict[str, Tensor]
FormatOf = Callable[[str], Callable[[Tensor], Tensor] | None]
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


class TinyModel(nn.Module):
    """Base and head with float32 master weights; compute weights are made from them per step."""

    def __init__(self, config_file: Path, experts: str, dropout: float) -> None:
        super().__init__()
        config = DeepseekV4Config(**json.loads(config_file.read_text()))
        self.window: int = config.sliding_window
        self.base = DeepseekV4ForCausalLM._from_config(
            config, dtype=torch.float32, attn_implementation="eager", experts_implementation=experts
        )
        self.head = MTPHead(config)
        self.dropout = dropout
        self.routers = [m for m in self.modules() if isinstance(m, DeepseekV4TopKRouter)]
        self._residual: Tensor | None = None
        self.base.model.hc_head.register_forward_pre_hook(self._keep_residual)
        for module in self.modules():
            if isinstance(module, DeepseekV4Indexer):
                skip_selection(module)
        for layer in [*self.base.model.layers, self.head.layer]:
            for module in (layer.self_attn, layer.mlp):
                module.register_forward_hook(lambda m, _, out: drop(m, out, self.dropout))
        for router in self.routers:
            router.register_forward_hook(count_load)

    def _keep_residual(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._residual = args[0]

    def base_weights(self, quantize: bool) -> Weights:
        """Return the compute weights of the base, as shipped if `quantize`."""
        return compute_weights(self.base, fake_quant.base_format if quantize else None)

    def head_weights(self, quantize: bool) -> Weights:
        """Return the compute weights of the head, as shipped if `quantize`."""
        return compute_weights(self.head, fake_quant.head_format if quantize else None)

    def run_base(self, weights: Weights, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, T, V] and residual stream [B, T, H, D] for `ids` [B, T]."""
        positions = positions_of(ids)
        # Built here because transformers' mask builder synchronizes with the device.
        distance = positions[:1, :, None] - positions[:1, None, :]  # [1, T query, T key]
        hidden = (distance < 0) | (distance >= self.window)
        mask = torch.zeros(hidden.shape, dtype=weights[EMBEDDING].dtype, device=ids.device)
        mask = mask.masked_fill(hidden, float("-inf")).expand(len(ids), 1, -1, -1)
        arguments = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": {"sliding_attention": mask},
            "use_cache": False,
        }
        logits = functional_call(self.base, weights, (), arguments).logits
        residual, self._residual = self._residual, None
        assert residual is not None
        return logits, residual

    def run_head(
        self, weights: Weights, residual: Tensor, next_ids: Tensor, embedding: Tensor, lm: Tensor
    ) -> Tensor:
        """Return the head's logits [B, T, V]: position i, given token i+1, predicts token i+2."""
        embeds = F.embedding(next_ids, embedding)  # [B, T, D]
        substituted = {f"head.{name}": weight for name, weight in weights.items()}
        arguments = (residual, embeds, positions_of(next_ids), lm)
        return functional_call(_HeadLogits(self.head), substituted, arguments)


class _HeadLogits(nn.Module):
    """The head up to its logits in one call, which is what functional_call can substitute in."""

    def __init__(self, head: MTPHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, residual: Tensor, embeds: Tensor, positions: Tensor, lm: Tensor) -> Tensor:
        return self.head.logits(self.head(residual, embeds, positions), lm)


def positions_of(ids: Tensor) -> Tensor:
    """Return the positions [B, T] of rows that all start at 0."""
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1)


def compute_weights(module: nn.Module, format_of: FormatOf | None) -> Weights:
    """Return what `module` computes with: its weights, stored and read back if a format is given.

    On a GPU experts, embedding and norms come in BF16, which autocast does not cover: grouped_mm
    takes BF16 alone, and the residual stream is BF16 when served.
    """
    weights: Weights = {}
    for name, weight in module.named_parameters():
        rule = None if format_of is None else format_of(name)
        used = weight if rule is None else fake_quant.straight_through(weight, rule)
        low = ".mlp.experts." in name or "norm." in name or name == EMBEDDING
        weights[name] = used.bfloat16() if low and weight.is_cuda else used
    return weights


def drop(module: nn.Module, output: Tensor | tuple, share: float) -> Tensor | tuple:
    """Return what a layer adds with a share of it left out, in training."""
    kept, *others = output if isinstance(output, tuple) else (output,)
    kept = F.dropout(kept, share, training=module.training)
    return (kept, *others) if isinstance(output, tuple) else kept


def balance(routers: list[nn.Module], rate: float) -> None:
    """Nudge every expert's selection bias against its load (noaux_tc), then forget the load."""
    for router in routers:
        load = router.load
        router.e_score_correction_bias += rate * torch.sign(load.mean() - load)
        load.zero_()


def expert_load(routers: list[nn.Module]) -> list[float]:
    """Return, per scored router, the busiest expert's load over the mean since the update."""
    loads = [router.load.max() / router.load.mean().clamp(min=1) for router in routers]
    return [round(load.item(), 2) for load in loads]


def count_load(router: nn.Module, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Add the routing of one training step to `router.load` [E]."""
    if router.training:
        chosen = output[2].flatten()
        router.load.index_add_(0, chosen, torch.ones_like(chosen, dtype=router.load.dtype))


def skip_selection(indexer: DeepseekV4Indexer) -> None:
    """Let the indexer return every visible block without scoring.

    It selects them anyway while a sequence has at most `index_topk` blocks (2,048 tokens here).
    """

    def forward(hidden: Tensor, _q: Tensor, position_ids: Tensor, *_: object) -> Tensor:
        num_blocks = hidden.shape[1] // indexer.compress_rate
        assert num_blocks <= indexer.index_topk, "too long a sequence to skip the selection"
        visible = (position_ids + 1) // indexer.compress_rate  # [B, T]
        blocks = torch.arange(num_blocks, device=hidden.device).expand(*visible.shape, -1)
        return torch.where(blocks < visible.unsqueeze(-1), blocks, -1)  # [B, T, blocks]

    indexer.forward = forward


def initialize(model: TinyModel, token_counts: Tensor, seed: int) -> None:
    """Fill all weights from `seed`; `token_counts` [V] balances the hash layer's experts."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.copy_(initial_value(name, weight.shape, generator))
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(balanced_experts(token_counts, *buffer.shape[1:], generator=generator))
        elif name.endswith("e_score_correction_bias"):
            buffer.zero_()
    for router in model.routers:
        router.load = torch.zeros(router.num_experts)


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return a parameter's first value."""
    noise = torch.randn(shape, generator=generator)
    leaf = name.rsplit(".", 1)[-1]
    if "norm" in name:
        return torch.ones(shape)
    if leaf in ("sinks", "position_bias", "hc_base"):
        return torch.zeros(shape)
    if leaf in ("scale", "hc_scale"):
        return torch.full(shape, 0.1)  # small, so that the mixing starts nearly static
    if leaf == "base":
        # pre [4], post [4], comb [4, 4]: the streams start out unmixed.
        return torch.cat((torch.zeros(8), 3 * torch.eye(4).flatten()))
    if leaf in ("fn", "hc_fn") or name.endswith(LM_HEAD):
        return 0.02 * noise
    if name.endswith(EMBEDDING):
        return 0.2 * noise
    return noise / math.sqrt(shape[-1])


def balanced_experts(
    token_counts: Tensor, top_k: int, num_experts: int = 64, *, generator: torch.Generator
) -> Tensor:
    """Return distinct experts [V, top_k] per token such that all experts get equal traffic."""
    load = torch.zeros(num_experts, dtype=torch.float64)
    experts = torch.zeros(len(token_counts), top_k, dtype=torch.int64)
    for token in token_counts.argsort(descending=True).tolist():
        shuffle = torch.randperm(num_experts, generator=generator)
        least = shuffle[load[shuffle].argsort(stable=True)[:top_k]]
        experts[token] = least
        load[least] += float(token_counts[token]) + 1
    return experts
