"""Gap: scales of the experts' w1 and w3 are mixed up where a rank's share of one is one group.

Marlin keeps the scales of one group in another order than those of several. vLLM asks a rank's
intermediate size which of the two w1 and w3 have, whose groups run along the hidden size. Where
that is no larger than a group, the scales of every 64 columns trade places; no error, no noise,
other text. At TP 2 that is the tiny model (128), Flash (2,048) it is at TP 16. Reported in
vllm-project/vllm#50196; read in 0.33.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Permute = Callable[..., Tensor]


def apply() -> None:
    """Let the scales' own number of groups decide; safe to call twice."""
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16

    if not getattr(int_wna16.marlin_moe_permute_scales, "counts_groups", False):
        int_wna16.marlin_moe_permute_scales = counting_groups(int_wna16.marlin_moe_permute_scales)


def counting_groups(permute: Permute) -> Permute:
    """Return `permute` with `size_k`, the number of inputs, taken from the scales [E, G, N]."""

    def permute_scales(s: Tensor, size_k: int, size_n: int, group_size: int, **more: Any) -> Tensor:
        if group_size > 0:
            size_k = s.shape[1] * group_size
        return permute(s=s, size_k=size_k, size_n=size_n, group_size=group_size, **more)

    permute_scales.counts_groups = True  # type: ignore[attr-defined]
    return permute_scales
