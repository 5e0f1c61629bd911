"""How a checkpoint stores a tensor: plain, or a matrix as FP8, MXFP4 or INT4.

A module's tensors are its *parts*, `weight_packed` and `weight_scale` say; a parameter that is no
module's is the part "". Meta tensors pass through everything here.

Shapes: O outputs, I inputs.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from mtp_graft.dsv4.names import storage_dtype
from mtp_graft.errors import GraftError
from mtp_graft.quant import FP8_BLOCK, MXFP4_GROUP, decode_fp8, decode_mxfp4, int4

Format = Literal["plain", "fp8", "mxfp4", "int4", "int4-asymmetric", "int8"]
Parts = Mapping[str, Tensor]
_PARTS = ("weight", "scale", "weight_scale", "weight_packed", "weight_shape", "weight_zero_point")


def modules_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return module -> part -> tensor, modules in the order of their first name.

    `mtp.0.norm.weight` is part `weight` of `mtp.0.norm`; `mtp.0.hc_attn_fn` is its own part "".
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part not in _PARTS:
            module, part = name, ""
        modules.setdefault(module, {})[part] = tensor
    return modules


def part_name(module: str, part: str) -> str:
    """Return the full name of a module's part."""
    return f"{module}.{part}" if part else module


def weight_of(parts: Parts) -> Tensor | None:
    """Return a module's weight, packed or not, or the parameter."""
    return next((parts[part] for part in ("weight_packed", "weight", "") if part in parts), None)


def shape_of(parts: Parts) -> tuple[int, int]:
    """Return O and I of a matrix by its codes."""
    codes = parts.get("weight_packed", parts.get("weight"))
    assert codes is not None
    per_element = {torch.int32: int4.CODES_PER_WORD, torch.uint8: 2}.get(codes.dtype, 1)
    return codes.shape[0], codes.shape[-1] * per_element


def format_of(parts: Parts, num_bits: int = 4) -> Format | None:
    """Return the format by the weight's dtype, whatever else is there; None if it is of no such.

    `num_bits` are those of packed integers, which only the config tells.
    """
    if (weight := weight_of(parts)) is None:
        return None
    if "weight_packed" in parts:
        if weight.dtype == torch.int32 and "weight_zero_point" in parts:
            return "int4-asymmetric"
        integers: Format = "int8" if num_bits == 8 else "int4"
        packed: dict[torch.dtype, Format] = {torch.int32: integers, torch.uint8: "mxfp4"}
        return packed.get(weight.dtype)
    if weight.dtype == torch.float8_e4m3fn:
        return "fp8"
    return "plain" if weight.element_size() > 1 else None


def stored_as(name: str, shape: tuple[int, ...], kind: str, group_size: int) -> dict[str, Tensor]:
    """Return the meta tensors in which a checkpoint stores a decoded tensor of this name.

    `kind` is a `Format`. A matrix [O, I] has a scale for `group_size` inputs (integers; all for
    -1), 32 inputs (MXFP4) or a block of 128 x 128 (FP8). Anything but a matrix is plain.
    """
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"": (storage_dtype(name), shape)}
    if kind != "plain" and len(shape) == 2:
        outputs, inputs = shape
        groups = inputs // group_size if group_size > 0 else 1
        per_word = 4 if kind == "int8" else int4.CODES_PER_WORD
        parts = {
            "_packed": (torch.int32, (outputs, inputs // per_word)),
            "_scale": (torch.bfloat16, (outputs, groups)),
            "_shape": (torch.int64, (2,)),
        }
        if kind == "int4-asymmetric":
            parts["_zero_point"] = (torch.int32, (-(-outputs // per_word), groups))
        if kind == "mxfp4":
            codes, scale = (outputs, inputs // 2), (outputs, inputs // MXFP4_GROUP)
            parts = {"_packed": (torch.uint8, codes), "_scale": (torch.uint8, scale)}
        if kind == "fp8":
            blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
            parts = {"": (torch.float8_e4m3fn, shape), "_scale": (torch.bfloat16, blocks)}
    return {
        f"{name}{part}": torch.empty(size, dtype=dtype, device="meta")
        for part, (dtype, size) in parts.items()
    }


def decode(kind: Format, parts: Parts) -> Tensor:
    """Return the float32 values of a module's parts, which are those of `stored_as`."""
    if kind != "plain" and parts["weight_scale"].is_meta:  # computing takes seconds for a head
        return torch.empty(shape_of(parts), device="meta")
    match kind:
        case "plain":
            (tensor,) = parts.values()
            return tensor.float()
        case "int4":
            return int4.decode(int4.unpack(parts["weight_packed"]), parts["weight_scale"])
        case "mxfp4":
            return decode_mxfp4(parts["weight_packed"], parts["weight_scale"])
        case "fp8":
            return decode_fp8(parts["weight"], parts["weight_scale"])
        case "int4-asymmetric" | "int8":
            raise GraftError(f"the head's experts are {kind}; expected MXFP4, BF16 or INT4")


def int4_parts(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return INT4 codes [O, I] and scales [O, I/group] as a checkpoint has them."""
    shape = torch.tensor(codes.shape, dtype=torch.int64)
    return {"weight_packed": int4.pack(codes), "weight_scale": scale, "weight_shape": shape}
