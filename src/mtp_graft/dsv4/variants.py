"""How a checkpoint stores a tensor, and the head's variants, from upstream's tensors and back.

A tensor is plain, or a matrix as FP8, MXFP4 or INT4. A module's tensors are its *parts*,
`weight_packed` and `weight_scale` say; a parameter that is no module's is the part "". Meta tensors
pass through everything here, which gives names, shapes and sizes before anything is computed.

Shapes: O outputs, I inputs.
"""

import re
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mtp_graft.dsv4.names import EXPERT, Weights, storage_dtype
from mtp_graft.errors import GraftError
from mtp_graft.quant import FP8_BLOCK, MXFP4_GROUP, decode_fp8, decode_mxfp4, int4, meta
from mtp_graft.recipe import LinearDtype, Variant

#: `plain`, `fp8`, `mxfp4`, or integers of so many bits: `int4`, `int4-asymmetric`, `int8`, ...
Format = str
Parts = Weights
_PARTS = ("weight", "scale", "weight_scale", "weight_packed", "weight_shape", "weight_zero_point")
#: Which of the head's FP8 modules are decoded to BF16 (exact); the others keep their codes. "base"
#: is as in the base, "bf16" as in the published checkpoint.
_DECODED: dict[LinearDtype, re.Pattern[str]] = {
    "fp8": re.compile("$^"),
    "base": re.compile(r"mtp\.\d+\.ffn\.shared_experts\."),
    "bf16": re.compile(r"mtp\.\d+\.(ffn\.shared_experts\.|(e_proj|h_proj|main_proj)$)"),
}


def store_head(
    upstream: Weights,
    variant: Variant,
    gptq_experts: Weights | None = None,
    *,
    group_size: int = 128,
    linear_dtype: LinearDtype = "base",
) -> dict[str, Tensor]:
    """Return the stored `mtp.*` tensors of `variant`, from upstream's or some modules of them.

    Routed experts become what `variant` says. FP8 modules keep their codes or are decoded to BF16,
    as `linear_dtype` says. All else stays as it is. Raises GraftError for parts that are missing or
    do not fit each other, and for a gptq expert that is not in `gptq_experts`.
    """
    stored: dict[str, Tensor] = {}
    for module, kind, parts in _modules(upstream, group_size):
        expected = "mxfp4" if EXPERT.match(module) else "fp8 or plain"
        if kind not in expected.split(" or "):
            raise GraftError(f"{module}: is {kind}, not {expected}; take DeepSeek's head")
        kept = parts
        if kind == "mxfp4":
            kept = _store_expert(module, parts, variant, gptq_experts or {}, group_size)
        elif kind == "fp8" and _DECODED[linear_dtype].match(module):
            kept = {"weight": decode(kind, parts).to(torch.bfloat16)}
        stored |= {part_name(module, part): tensor for part, tensor in kept.items()}
    return stored


def decode_head(stored: Weights, *, group_size: int = 128) -> dict[str, Tensor]:
    """Return float32 tensors under plain names, from upstream's or any variant's, or raise so."""
    return dict(Decoded(stored, group_size=group_size))


class Decoded(UserDict[str, Any]):
    """What `decode_head` returns, each tensor decoded when it is asked for: on `device`, if any."""

    def __init__(
        self, stored: Weights, *, group_size: int = 128, device: str | None = None
    ) -> None:
        super().__init__(
            {
                module if "" in parts else f"{module}.weight": (kind, parts)
                for module, kind, parts in _modules(stored, group_size)
            }
        )
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        kind, parts = self.data[name]
        return decode(kind, {n: part.to(self._device or part.device) for n, part in parts.items()})


def _modules(tensors: Weights, group_size: int) -> Iterator[tuple[str, Format, Parts]]:
    """Yield every module with its parts, checked; upstream's get a checkpoint's names (exact)."""
    for module, found in modules_of(tensors).items():
        parts = _renamed(found)
        kind, weight = format_of(parts), weight_of(parts)
        is_plain = weight is not None and len(parts) == 1 and weight.is_floating_point()
        is_matrix = weight is not None and weight.dim() == 2
        if kind is None or not (is_plain if kind == "plain" else is_matrix):
            expected = "a weight with its scale, packed codes with theirs, or an unquantized weight"
            problem = f"has {_said(parts)}; expected {expected}"
            raise GraftError(f"{module}: {problem}; a tensor is missing or belongs elsewhere")
        if kind != "plain":
            _check_matrix(module, kind, parts, shape_of(parts), group_size)
        _expect_finite(module, parts)
        yield module, kind, parts


def _renamed(parts: Parts) -> Parts:
    if parts.keys() != {"weight", "scale"}:
        return parts
    codes, scale = parts["weight"], parts["scale"]
    if scale.dtype in (torch.int8, torch.uint8):  # E8M0 under another label
        scale = scale.view(torch.float8_e8m0fnu)
    is_e8m0 = scale.dtype == torch.float8_e8m0fnu
    if codes.dtype in (torch.int8, torch.uint8):
        as_byte = scale.view(torch.uint8) if is_e8m0 else scale
        return {"weight_packed": codes.view(torch.uint8), "weight_scale": as_byte}
    rounded = scale.to(torch.bfloat16)  # which is exact for a power of two
    is_float = scale.dtype in (torch.bfloat16, torch.float32)
    is_exact = is_e8m0 or (is_float and (scale.is_meta or rounded.float().equal(scale.float())))
    return {"weight": codes, "weight_scale": rounded if is_exact else scale}


def _store_expert(
    module: str, parts: Parts, variant: Variant, gptq_experts: Weights, group_size: int
) -> Parts:
    shape = shape_of(parts)
    layout = stored_as("weight", shape, "int4", group_size)
    match variant:
        case "mxfp4":
            return parts
        case "bf16":
            return {"weight": decode("mxfp4", parts).to(torch.bfloat16)}
        case "rtn":
            _check_matrix(module, "int4", layout, shape, group_size)
            if parts["weight_packed"].is_meta:  # computing without values takes seconds for a head
                return layout
            weight = decode("mxfp4", parts)
            scale = int4.group_scale(weight, group_size)
            return int4_parts(int4.encode(weight, scale), scale)
        case "gptq":
            names = {part: part_name(module, part) for part in layout}
            if missing := [name for name in names.values() if name not in gptq_experts]:
                problem = "not among the quantized experts; run `quantize` to its end"
                raise GraftError(f"{missing[0]}: {problem}")
            found = {part: gptq_experts[name] for part, name in names.items()}
            _check_matrix(f"quantized {module}", "int4", found, shape, group_size)
            _expect_finite(module, found)
            return found


def _check_matrix(
    module: str, kind: Format, parts: Parts, shape: tuple[int, int], group_size: int
) -> None:
    """Raise GraftError for parts that are not those of a matrix of `shape`."""
    group = MXFP4_GROUP if kind == "mxfp4" else group_size
    if kind != "fp8" and shape[1] % group:
        problem = f"{shape[1]} inputs are no multiple of the group size {group}"
        raise GraftError(f"{module}: {problem}; choose one that divides them")
    found, expected = _said(parts), _said(stored_as("weight", shape, kind, group))
    if found != expected:
        sizes = f"out {shape[0]}, in {shape[1]}, group {group}"
        cure = "recipe and checkpoint disagree, or a shard is damaged: fetch it again"
        raise GraftError(f"{module}: has {found}, expected {expected} ({sizes}); {cure}")
    said = parts.get("weight_shape")
    if said is not None and not said.is_meta and tuple(said.tolist()) != shape:
        raise GraftError(f"{module}: weight_shape is {said.tolist()}, expected {shape}")


def _said(parts: Parts) -> str:
    return ", ".join(f"{part} {list(t.shape)} {t.dtype}" for part, t in sorted(parts.items()))


def _expect_finite(module: str, parts: Parts) -> None:
    """Raise GraftError for a value or a scale, an exponent's byte included, that is no number."""
    for part, tensor in parts.items():
        is_exponent = part == "weight_scale" and tensor.dtype == torch.uint8
        values = tensor.view(torch.float8_e8m0fnu) if is_exponent else tensor
        has_values = values.is_floating_point() and not values.is_meta
        if has_values and not torch.stack(values.float().aminmax()).isfinite().all():
            what = "a scale" if "scale" in part else "a value"
            raise GraftError(f"{module}: has {what} that is not finite; fetch the shard again")


# Formats


def modules_of(tensors: Weights) -> dict[str, dict[str, Tensor]]:
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


def format_of(parts: Parts, inputs: int = 0) -> Format | None:
    """Return the format by the weight's dtype, whatever else is there; None if it is of no such.

    Packed integers have 4 bits, or, where the `inputs` are known, as many as there is room for.
    """
    if (weight := weight_of(parts)) is None:
        return None
    if "weight_packed" in parts:
        if weight.dtype != torch.int32:
            return "mxfp4" if weight.dtype == torch.uint8 else None
        bits = 32 * weight.shape[-1] // inputs if inputs else 4
        return f"int{bits}-asymmetric" if "weight_zero_point" in parts else f"int{bits}"
    if weight.dtype == torch.float8_e4m3fn:
        return "fp8"
    return "plain" if weight.element_size() > 1 else None


def stored_as(name: str, shape: tuple[int, ...], kind: str, group_size: int) -> dict[str, Tensor]:
    """Return the meta tensors in which a checkpoint stores a decoded tensor of this name.

    `kind` is a `Format`. A matrix [O, I] has a scale for `group_size` inputs (integers; all for
    -1), 32 inputs (MXFP4) or a block of 128 x 128 (FP8). Anything but a matrix is plain.
    """
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"": (storage_dtype(name), shape)}
    outputs, inputs = shape if len(shape) == 2 else (0, 0)
    if outputs and kind == "fp8":
        blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
        parts = {"": (torch.float8_e4m3fn, shape), "_scale": (torch.bfloat16, blocks)}
    elif outputs and kind == "mxfp4":
        codes, scale = (outputs, inputs // 2), (outputs, inputs // MXFP4_GROUP)
        parts = {"_packed": (torch.uint8, codes), "_scale": (torch.uint8, scale)}
    elif outputs and kind != "plain":
        groups, bits = inputs // group_size if group_size > 0 else 1, int(kind[3])
        codes, scale = (outputs, inputs * bits // 32), (outputs, groups)
        parts = {"_packed": (torch.int32, codes), "_scale": (torch.bfloat16, scale)}
        parts["_shape"] = (torch.int64, (2,))
        if kind.endswith("-asymmetric"):
            parts["_zero_point"] = (torch.int32, (-(-outputs * bits // 32), groups))
    return {f"{name}{part}": meta(size, dtype=dtype) for part, (dtype, size) in parts.items()}


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
        case _:
            raise GraftError(f"the head's experts are {kind}; expected MXFP4, BF16 or INT4")


def int4_parts(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return INT4 codes [O, I] and scales [O, I/group] as a checkpoint has them."""
    shape = torch.tensor(codes.shape, dtype=torch.int64)
    return {"weight_packed": int4.pack(codes), "weight_scale": scale, "weight_shape": shape}
