"""Gap: the first half of attention's output projection sums few rows in another order than many.

vLLM multiplies by `wo_a` in a kernel of its own, `bmm_cpu`, without asking the layer. With AMX it
takes another order of sums for less than five rows, as `order_free` says of its linears.
"""

from torch import Tensor, nn
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.cpu.order_free import MIN_ROWS, at_least


class RowwiseAttention(DeepseekV4CPUAttention):
    """vLLM's CPU attention whose projection of a token does not depend on the tokens beside it."""

    def _o_proj(self, o: Tensor, positions: Tensor) -> Tensor:
        """Return the projection [T, D] of the heads' outputs `o` [T, heads, head_dim]."""
        projected: Tensor = super()._o_proj(at_least(MIN_ROWS, o), at_least(MIN_ROWS, positions))
        return projected[: len(o)]


def project_rowwise(model: nn.Module) -> None:
    """Make every attention of `model` a `RowwiseAttention`, as vLLM changes its caches' classes.

    Raises GraftError if there is none.
    """
    layers = [m for m in model.modules() if type(m) is DeepseekV4CPUAttention]
    if not layers:
        raise GraftError("found no attention in the model's layers; is this vLLM a supported one?")
    for layer in layers:
        layer.__class__ = RowwiseAttention
