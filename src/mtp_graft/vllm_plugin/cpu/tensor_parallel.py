"""Gap: ranks round their partial sums to BF16 before they add them.

What a row-parallel layer computes in two ranks then differs from one rank in the last bits of
every value, and a router that hesitates between two experts turns a last bit into another expert.
On a CPU partial sums are therefore added in float32 and rounded once, as a single rank does.

vLLM adds the ranks' results itself afterwards, in BF16. So rank 0 returns the whole sum and the
others zeros: adding zeros is exact.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod

from mtp_graft.vllm_plugin.cpu import rowwise


def is_split_by_rows(layer: object) -> bool:
    """Return whether `layer` leaves partial sums that the ranks have to add."""
    return isinstance(layer, RowParallelLinear) and get_tensor_model_parallel_world_size() > 1


def add_over_ranks(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Return this rank's share of the sum of float32 `partial` [T, O]: all of it, or zeros."""
    if get_tensor_model_parallel_world_size() == 1:
        return partial.to(dtype)
    total = tensor_model_parallel_all_reduce(partial).to(dtype)
    return total if get_tensor_model_parallel_rank() == 0 else torch.zeros_like(total)


class Float32RowParallelLinear(UnquantizedLinearMethod):
    """A row-parallel linear in the model's dtype whose partial sums are added in float32."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Widen the weight to float32, exactly."""
        layer.weight = nn.Parameter(layer.weight.data.float(), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return this rank's share of `x` [T, I] times the weight [O, I]."""
        assert bias is None, "DeepSeek-V4 has no biases here"
        return add_over_ranks(rowwise.linear(x.float(), layer.weight), x.dtype)
