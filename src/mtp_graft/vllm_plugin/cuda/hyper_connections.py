"""Gap, until vLLM 0.30: the fused hyper-connection kernel skips its work for small hidden sizes.

Steps of up to 16 tokens split the hidden size over 8 or 4 blocks of 256 threads, and every thread
takes `hidden_size / splits // 256` elements: none at all where that is below 1. The outputs then
hold whatever was in memory, without an error. Flash (4,096) is not affected, the tiny model is.
"""

from typing import Any

import vllm
from packaging.version import Version
from torch import Tensor

_FIXED = Version("0.30.0")
_THREADS = 256


def apply(hidden_size: int) -> None:
    """Replace the fused kernel by its two halves if `hidden_size` is one it gets wrong."""
    if Version(vllm.__version__) >= _FIXED or is_covered(hidden_size):
        return
    from vllm.models.deepseek_v4.nvidia import model

    model.mhc_fused_post_pre_tilelang = post_then_pre


def is_covered(hidden_size: int) -> bool:
    """Return whether every launch of the fused kernel covers all of `hidden_size`."""
    splits = (8, 4) if hidden_size <= 4096 else (4,)
    return all(hidden_size % (_THREADS * n) == 0 for n in splits)


def post_then_pre(
    x: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    res_mix: Tensor,
    *mixing: Any,
    n_splits: int = 1,
    tile_n: int = 1,
    **norm: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `mhc_fused_post_pre_tilelang` does, one half after the other.

    x [T, D], residual [T, S, D], post_mix [T, S, 1], res_mix [T, S, S]; returns the new residual,
    the next post_mix and res_mix, and the next layer's input [T, D]. The splits are the fused
    kernel's own business.
    """
    from vllm.models.deepseek_v4.nvidia import model

    residual = model.mhc_post_tilelang(x, residual, post_mix, res_mix)
    post_mix, res_mix, x = model.mhc_pre_tilelang(residual, *mixing, **norm)
    return residual, post_mix, res_mix, x
