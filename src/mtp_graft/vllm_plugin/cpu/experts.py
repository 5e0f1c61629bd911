"""Routed experts on a CPU: stored INT4, MXFP4 or BF16, run with the clamp of DeepSeek-V4.

Gap: `cpu_fused_moe`, vLLM's CPU kernel, takes no `swiglu_limit`. It is right only while no
activation passes the limit of 10, so the experts are computed here, with the clamp.

Shapes: E experts, M intermediate size (of this rank), D hidden size, T tokens, K experts a token.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.utils import set_weight_attrs

from mtp_graft.dsv4.variants import Format, decode, stored_as
from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.cpu.order_free import add_over_ranks
from mtp_graft.vllm_plugin.cpu.recording import request_bounds

#: A request's next token and up to seven drafts; a shorter prompt is computed like them.
MAX_VERIFIED_TOKENS = 8


def prompts_apart(num_tokens: int) -> Iterator[tuple[bool, slice]]:
    """Yield the rows of the step's T tokens in runs, and of each whether they are prompts'."""
    bounds = request_bounds()
    requests = groupby(pairwise(bounds), lambda bound: bound[1] - bound[0] > MAX_VERIFIED_TOKENS)
    for is_prompt, run in requests:
        rows = [*run]
        yield is_prompt, slice(rows[0][0], rows[-1][1])
    if bounds[-1] < num_tokens:
        yield True, slice(bounds[-1], num_tokens)  # no requests: a run to measure memory, say


def clamped_pairs(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, limit: float
) -> Tensor:
    """Return the weighted sum [T, D] of each token's K experts, one (token, expert) pair at a time.

    `x` [T, D], float32 `w13` [E, 2M, D] (gate rows first) and `w2` [E, D, M], `topk_weights` and
    `topk_ids` [T, K]. All pairs of an expert follow each other: its weights are in the cache.
    """
    choices = topk_ids.shape[1]  # pair r belongs to token r // K
    experts, weights = topk_ids.flatten().tolist(), topk_weights.flatten().tolist()
    pairs = sorted(range(len(experts)), key=experts.__getitem__)
    rows = x.float().unbind()
    gate_up = w13.new_empty(len(pairs), w13.shape[1])  # [T*K, 2M]
    products = gate_up.unbind()
    for expert, mine in groupby(pairs, experts.__getitem__):
        weight = w13[expert]
        for pair in mine:
            torch.mv(weight, rows[pair // choices], out=products[pair])
    # Elementwise over whole rows: M is a multiple of the group size, so no row shares a vector.
    hidden = _activation(gate_up, limit).unbind()  # T*K of [M]
    out = w2.new_zeros(x.shape)
    sums = out.unbind()
    for expert, mine in groupby(pairs, experts.__getitem__):
        weight = w2[expert]
        for pair in mine:
            sums[pair // choices].addmv_(weight, hidden[pair], alpha=weights[pair])
    return out


def clamped_experts(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, limit: float
) -> Tensor:
    """Return the same expert by expert, with float64 `w13` and `w2`, not yet rounded."""
    x = x.double()
    out = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        hidden = _activation(F.linear(x[token], w13[expert]), limit)  # [rows, M]
        weights = topk_weights[token, choice].double().unsqueeze(-1)  # [rows, 1]
        out.index_add_(0, token, F.linear(hidden, w2[expert]) * weights)
    return out


def _activation(gate_up: Tensor, limit: float) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


class ClampedCPUExperts(CPUUnquantizedExperts):
    """vLLM's portable CPU experts with the swiglu clamp; weights stay in their plain layout."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Remember the layer's clamp, and its weights in float64 for prompts."""
        if layer.swiglu_limit is None:
            raise GraftError("the experts have no swiglu_limit; expected DeepSeek-V4's, 10.0")
        self._limit = float(layer.swiglu_limit)
        self._float64 = (layer.w13_weight.data.double(), layer.w2_weight.data.double())

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write the experts' sum for `hidden_states` [T, D] into `output`, added over ranks.

        Decoded tokens, bound by reading weights, go pair by pair in float32, prompts by expert.
        """
        mine = torch.empty_like(hidden_states, dtype=torch.float64)
        for is_prompt, rows in prompts_apart(len(hidden_states)):
            way = clamped_experts if is_prompt else clamped_pairs
            w13, down = self._float64 if is_prompt else (w1, w2)
            x, weights, ids = hidden_states[rows], topk_weights[rows], topk_ids[rows]
            mine[rows] = way(x, w13, down, weights, ids, self._limit)
        output.copy_(add_over_ranks(mine, output.dtype))


class StoredExperts(UnquantizedFusedMoEMethod):
    """Experts stored as `kind` says, and run in float32."""

    def __init__(self, moe: FusedMoEConfig, kind: Format, group_size: int = 1) -> None:
        super().__init__(moe)
        self.kind, self.group_size = kind, group_size
        self.experts_cls = ClampedCPUExperts

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Register `{w13,w2}_weight`, or `_weight_packed` and `_weight_scale` (and `_shape`)."""
        size = intermediate_size_per_partition
        attributes |= {"is_transposed": False, "quant_method": "group"}
        for matrix, shape in (("w13", (2 * size, hidden_size)), ("w2", (hidden_size, size))):
            if shape[1] % self.group_size:
                found = f"{shape[1]} inputs a rank do not divide into groups of {self.group_size}"
                raise GraftError(f"{matrix}: {found}; use a smaller tensor parallel size")
            parts = stored_as(f"{matrix}_weight", shape, self.kind, self.group_size)
            for name, like in parts.items():
                tensor = torch.zeros(num_experts, *like.shape, dtype=like.dtype)
                parameter = nn.Parameter(tensor, requires_grad=False)
                set_weight_attrs(parameter, attributes)
                layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Replace the stored tensors by float32 `w13_weight` and `w2_weight`."""
        for matrix in ("w13_weight", "w2_weight"):
            stored = {n: p.data for n, p in layer.named_parameters() if n.startswith(matrix)}
            for name in stored:
                delattr(layer, name)
            parts = {name.replace(matrix, "weight"): tensor for name, tensor in stored.items()}
            weight = decode(self.kind, parts)  # of all experts, [E, O, I]
            layer.register_parameter(matrix, nn.Parameter(weight, requires_grad=False))
        super().process_weights_after_loading(layer)
