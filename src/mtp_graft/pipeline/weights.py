"""The tensors of base and head before their shards are there: on the meta device, from the config.

A base is taken to be W4A16-FP8 as docs/format.md describes it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mtp_graft.dsv4.head_shapes import base_shapes, head_shapes, stored_as
from mtp_graft.dsv4.names import EXPERT, FP8_LINEAR, FP8_UPSTREAM_ONLY
from mtp_graft.dsv4.variants import keeps_fp8
from mtp_graft.recipe import Linears, Variant


def base_tensors(config: Mapping[str, Any], group_size: int) -> dict[str, Tensor]:
    """Return the base's tensors, of a config with all of its dimensions."""
    return _stored(
        base_shapes(config), "rtn", lambda name: FP8_LINEAR.search(name) is not None, group_size
    )


def head_tensors(
    config: Mapping[str, Any], variant: Variant, linears: Linears, group_size: int
) -> dict[str, Tensor]:
    """Return a variant's tensors; raises GraftError if the config lacks a dimension."""

    def is_fp8(name: str) -> bool:
        upstream = FP8_LINEAR.search(name) or FP8_UPSTREAM_ONLY.search(name)
        return upstream is not None and keeps_fp8(name, linears)

    return _stored(head_shapes(config), variant, is_fp8, group_size)


def _stored(
    shapes: Mapping[str, tuple[int, ...]],
    experts: Variant,
    is_fp8: Callable[[str], bool],
    group_size: int,
) -> dict[str, Tensor]:
    """Return tensors of these logical shapes as a checkpoint stores them."""
    of_experts = {"bf16": "plain", "mxfp4": "mxfp4"}.get(experts, "int4")
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        kind = of_experts if EXPERT.match(name) else "fp8" if is_fp8(name) else "plain"
        tensors |= stored_as(name, shape, kind, group_size)
    return tensors
