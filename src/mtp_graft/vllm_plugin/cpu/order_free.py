"""Gap: the last bits of a product depend on how it is computed, and greedy output on them.

A product's order of summation depends on the processor (AMX or not), the threads, the tokens
beside, and the ranks, which round to BF16 before they add. Near a tie of two experts or tokens, a
last bit makes another text: with several tokens verified in a step, beside others, on two ranks.

So linears whose inputs the ranks share are summed in float64 and rounded once: the result is the
same unless the sum is all but in the middle between two BF16 values, one in 10^11 or so. All others
keep vLLM's kernels, several times as fast, with numbers of rows at which a row's bits do not depend
on the others: below five, AMX has another order; beyond 32 and 1,024 inputs, oneDNN; without BF16
in the processor, it has another for what is left when threads share rows. Experts: see `experts`.

Shapes: T tokens, S streams, I inputs, O outputs, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm import distributed
from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.mhc import MHCPreOp
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention

from mtp_graft.errors import GraftError

#: vLLM's kernels get a multiple of the one number of rows, up to the other.
MIN_ROWS, MAX_ROWS = 8, 32


def at_least(num_rows: int, x: Tensor) -> Tensor:
    """Return `x` [T, ...] with rows of zeros behind it, if it has fewer than `num_rows`."""
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, max(0, num_rows - len(x))))


def in_blocks(kernel: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return [..., O] what `kernel` makes of `x` [..., I], a block of rows at a time."""
    rows = x.flatten(0, -2)
    padded = F.pad(rows, (0, 0, 0, -len(rows) % MIN_ROWS))
    blocks = [kernel(block) for block in padded.split(MAX_ROWS)]
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return out[: len(rows)].unflatten(0, x.shape[:-1])


def add_over_ranks(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Return this rank's share of the sum of `partial` [T, O]: all, or zeros for vLLM to add."""
    ranks = distributed.get_tensor_model_parallel_world_size()
    if ranks == 1:
        return partial.to(dtype)
    # The ranks' shared memory cannot add float64, but carry it as twice as many float32.
    carried = partial.double().view(torch.float32)
    parts = distributed.tensor_model_parallel_all_gather(carried, dim=0)
    total = parts.view(torch.float64).unflatten(0, (ranks, -1)).sum(0).to(dtype)
    is_first = distributed.get_tensor_model_parallel_rank() == 0
    return total if is_first else torch.zeros_like(total)


class OrderFreeLinear(UnquantizedLinearMethod):
    """A linear whose results do not depend on the rows beside, nor on the number of ranks."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the weight in float64 if ranks share its inputs, else as vLLM's kernels want it."""
        if isinstance(layer, RowParallelLinear):
            layer.float64_weight = layer.weight.data.double()
        super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x` [..., I] times the weight [O, I] in the dtype of `x`, or this rank's share."""
        assert bias is None, "DeepSeek-V4 has no biases here"
        if isinstance(layer, RowParallelLinear):
            return add_over_ranks(F.linear(x.double(), layer.float64_weight), x.dtype)
        return in_blocks(partial(super().apply, layer), x)


class OrderFreeHead(vocabulary.UnquantizedEmbeddingMethod):
    """The same for the LM head, whose vocabulary the ranks share."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the logits [T, V] of `x` [T, I] in its dtype."""
        assert bias is None, "DeepSeek-V4's head has no bias"
        return in_blocks(partial(super().apply, layer), x)


class OrderFreeMHCPre(MHCPreOp):
    """vLLM's start of a hyper-connection, with a row a thread: fewer are split into inputs."""

    def forward_cpu(self, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return (post, comb, layer input) of `residual` [T, S, D], as `MHCPreOp` does."""
        rows = at_least(torch.get_num_threads(), residual)
        return tuple(part[: len(residual)] for part in super().forward_cpu(rows, *args, **kwargs))


class OrderFreeAttention(DeepseekV4CPUAttention):
    """vLLM's attention, whose output projection multiplies by `wo_a` in a kernel of its own."""

    def _o_proj(self, o: Tensor, positions: Tensor) -> Tensor:
        """Return the projection [T, D] of the heads' outputs `o` [T, heads, head_dim]."""
        return super()._o_proj(at_least(MIN_ROWS, o), at_least(MIN_ROWS, positions))[: len(o)]


def free_from_order(model: nn.Module) -> None:
    """Do the same for the layers of `model` that vLLM asks no quantization config about.

    Raises GraftError if it has no attention or no hyper-connections: another vLLM's have new names.
    """
    found = set()
    for module in list(model.modules()):
        if isinstance(module, vocabulary.ParallelLMHead):
            module.quant_method = OrderFreeHead()
        elif type(getattr(module, "quant_method", None)) is UnquantizedLinearMethod:
            module.quant_method = OrderFreeLinear()  # the router
        elif type(module) is DeepseekV4CPUAttention:
            module.__class__ = OrderFreeAttention  # as vLLM changes its caches' classes
            found.add("attention")
        elif isinstance(getattr(module, "mhc_pre", None), MHCPreOp):
            module.mhc_pre = OrderFreeMHCPre()
            found.add("hyper-connections")
    if missing := {"attention", "hyper-connections"} - found:
        raise GraftError(f"the model has no {sorted(missing)}; is this vLLM a supported one?")
