"""In which format a stem is stored, what parts that takes, and which scheme loads it."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mtp_graft.quant import fp8_block, mxfp4

Format = Literal["int4", "mxfp4", "fp8", "plain"]

NEEDED: Mapping[Format, tuple[str, ...]] = {
    "int4": ("weight_packed", "weight_scale", "weight_shape"),
    "mxfp4": ("weight_packed", "weight_scale"),
    "fp8": ("weight", "weight_scale"),
    "plain": (),
}
_SCALES: Mapping[Format, tuple[torch.dtype, ...]] = {
    "int4": (torch.bfloat16, torch.float16, torch.float32),
    "mxfp4": (torch.uint8, torch.float8_e8m0fnu),
    "fp8": (torch.bfloat16, torch.float32),
}
#: Codes in one element of `weight_packed`.
_CODES: Mapping[Format, int] = {"int4": 8, "mxfp4": 2}


def format_of(parts: Mapping[str, Tensor]) -> Format | None:
    """Return the format by the dtype of the weight; None if there is no weight or no such dtype."""
    if (packed := parts.get("weight_packed")) is not None:
        by_dtype: dict[torch.dtype, Format] = {torch.int32: "int4", torch.uint8: "mxfp4"}
        return by_dtype.get(packed.dtype)
    weight = parts.get("weight", parts.get(""))
    if weight is None:
        return None
    if weight.dtype == torch.float8_e4m3fn:
        return "fp8"
    return "plain" if weight.element_size() > 1 else None


def logical_shape(stored: Format, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the shape of the decoded matrix."""
    if stored in _CODES:
        shape = parts["weight_packed"].shape
        return (*shape[:-1], shape[-1] * _CODES[stored])
    return tuple(parts["weight"].shape if "weight" in parts else parts[""].shape)


def scale_shape(stored: Format, shape: tuple[int, ...], group_size: int) -> tuple[int, ...]:
    """Return the shape that the scale of a matrix [O, I] has to have."""
    outputs, inputs = shape
    if stored == "fp8":
        return -(-outputs // fp8_block.BLOCK), -(-inputs // fp8_block.BLOCK)
    return outputs, inputs // (mxfp4.GROUP if stored == "mxfp4" else group_size)


def scale_dtypes(stored: Format) -> tuple[torch.dtype, ...]:
    """Return the dtypes that vLLM reads a scale of this format from."""
    return _SCALES[stored]


def format_of_group(group: Mapping[str, Any] | None) -> str:
    """Return the format that a group of the quantization config loads; `plain` for None."""
    if group is None:
        return "plain"
    weights = group.get("weights") or {}
    kind, bits, strategy = (weights.get(key) for key in ("type", "num_bits", "strategy"))
    known: dict[tuple[Any, ...], str] = {
        ("int", 4, "group"): "int4",
        ("float", 4, "group"): "mxfp4" if weights.get("group_size") == mxfp4.GROUP else "nvfp4",
        ("float", 8, "block"): "fp8",
    }
    return known.get((kind, bits, strategy), f"{kind} of {bits} bits by {strategy}")
