"""The tensors of base and head before their shards are there: on the meta device, from the config.

A base is taken to be W4A16-FP8 as docs/format.md describes it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtp_graft.dsv4.head_shapes import head_shapes
from mtp_graft.dsv4.names import FP8_LINEAR, FP8_UPSTREAM_ONLY, storage_dtype
from mtp_graft.dsv4.variants import is_expert, keeps_fp8
from mtp_graft.recipe import Linears, Variant
from mtp_graft.serving.doctor.expected import Shapes, base_shapes
from mtp_graft.serving.doctor.formats import scale_shape


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
    shapes: Shapes, experts: Variant, is_fp8: Callable[[str], bool], group_size: int
) -> dict[str, Tensor]:
    """Return tensors of these logical shapes as a checkpoint stores them."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        if experts != "bf16" and is_expert(stem):
            int4, (outputs, inputs) = experts != "mxfp4", shape
            codes, scale = (torch.int32, torch.bfloat16) if int4 else (torch.uint8, torch.uint8)
            blocks = scale_shape("int4" if int4 else "mxfp4", shape, group_size)
            tensors[f"{stem}.weight_packed"] = _meta(codes, outputs, inputs // (8 if int4 else 2))
            tensors[f"{stem}.weight_scale"] = _meta(scale, *blocks)
            if int4:
                tensors[f"{stem}.weight_shape"] = _meta(torch.int64, 2)
        elif is_fp8(name):
            tensors[name] = _meta(torch.float8_e4m3fn, *shape)
            blocks = scale_shape("fp8", shape, group_size)
            tensors[f"{stem}.weight_scale"] = _meta(torch.bfloat16, *blocks)
        else:
            tensors[name] = _meta(storage_dtype(name), *shape)
    return tensors


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
