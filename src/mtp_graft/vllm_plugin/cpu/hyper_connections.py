"""Gap: the CPU kernel of hyper-connections sums a lone row in another order than one of several.

`hc_pre_fused_cpu` splits the 4 x D inputs of a row over the threads when there are fewer rows
than threads, and the rows over the threads otherwise. The last bits differ, so a token verified
beside a draft would not equal the same token decoded alone, and greedy output would depend on
speculation. So the kernel always gets a row for every thread.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.mhc import MHCPreOp

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.cpu.order_free import at_least


class RowwiseMHCPre(MHCPreOp):
    """vLLM's `MHCPreOp` whose result for a token does not depend on the tokens beside it."""

    def forward_cpu(self, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return (post, comb, layer input) of `residual` [T, 4, D], as `MHCPreOp` does."""
        rows = at_least(torch.get_num_threads(), residual)
        return tuple(part[: len(residual)] for part in super().forward_cpu(rows, *args, **kwargs))


def compute_rowwise(model: nn.Module) -> None:
    """Give every decoder layer in `model` a `RowwiseMHCPre`; raises GraftError if there is none."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "mhc_pre", None), MHCPreOp)]
    if not layers:
        raise GraftError("found no mhc_pre in the model's layers; is this vLLM a supported one?")
    for layer in layers:
        layer.mhc_pre = RowwiseMHCPre()
