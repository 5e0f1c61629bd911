"""Gap: the last bits of a product depend on how it is computed, and greedy output on them.

A product in BF16 or float32 sums in an order that depends on the processor (AMX or not), the
threads, the rows beside, and the ranks, which round to BF16 before they add. A router that
hesitates between two experts, or a tie between two tokens, turns a last bit into another text: with
speculation, which verifies several tokens in a step, beside other requests, or on two ranks.

So the products of a prompt are summed in float64 and rounded once: whatever the order, the result
is the same, unless the sum lies within rounding of the middle between two BF16 values, one in 10^11
or so. Decode steps, where float64 would cost a third of the speed, keep vLLM's kernels, which give
a row of so few the same bits as alone; on several ranks they are computed row by row.

Shapes: T tokens, S streams, I inputs, O outputs, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

#: A verification step has at most this many tokens: eight requests with k = 3, say.
MAX_DECODE_TOKENS = 32


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x` [T, I] or [T, S, I] times float64 `weight` [O, I], transposed, not yet rounded."""
    if x.shape[0] > MAX_DECODE_TOKENS:
        return F.linear(x.double(), weight)
    rows = x.double().flatten(0, -2)
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    for row, result in zip(rows, out, strict=True):
        torch.mv(weight, row, out=result)
    return out.unflatten(0, x.shape[:-1])


def add_over_ranks(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Return this rank's share of the sum of `partial` [T, O]: all of it, or zeros.

    vLLM adds the ranks' results itself, in BF16. So rank 0 has the whole sum and the others zeros:
    adding zeros is exact.
    """
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        return partial.to(dtype)
    # The ranks' shared memory cannot add float64, but carry it as twice as many float32.
    parts = tensor_model_parallel_all_gather(partial.double().view(torch.float32), dim=0)
    total = parts.view(torch.float64).unflatten(0, (ranks, -1)).sum(0).to(dtype)
    return total if get_tensor_model_parallel_rank() == 0 else torch.zeros_like(total)


class OrderFreeLinear(UnquantizedLinearMethod):
    """A linear whose results for prompts, and on several ranks, do not depend on any order."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the weight in float64 beside what vLLM packs for its kernels."""
        layer.float64_weight = layer.weight.data.double()
        super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x` [..., I] times the weight [O, I] in the dtype of `x`, or this rank's share."""
        assert bias is None, "DeepSeek-V4 has no biases here"
        if isinstance(layer, RowParallelLinear) and get_tensor_model_parallel_world_size() > 1:
            return add_over_ranks(product(x, layer.float64_weight), x.dtype)
        if x.shape[0] <= MAX_DECODE_TOKENS:
            return super().apply(layer, x)
        return product(x, layer.float64_weight).to(x.dtype)


class OrderFreeHead(UnquantizedEmbeddingMethod):
    """The same for the LM head."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the weight in float64 beside what vLLM packs for its kernels."""
        layer.float64_weight = layer.weight.data.double()
        super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the logits [T, V] of `x` [T, I] in its dtype."""
        assert bias is None, "DeepSeek-V4's head has no bias"
        if x.shape[0] <= MAX_DECODE_TOKENS:
            return super().apply(layer, x)
        return product(x, layer.float64_weight).to(x.dtype)


def free_from_order(model: nn.Module) -> None:
    """Do the same for the layers of `model` that vLLM asks no quantization config about."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method = OrderFreeHead()
        elif type(getattr(module, "quant_method", None)) is UnquantizedLinearMethod:
            module.quant_method = OrderFreeLinear()  # the router
