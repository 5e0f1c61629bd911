"""The head's variants: from upstream's tensors to what a checkpoint stores, and back to float32.

A module's tensors are its *parts*; which ones there are says in which format it is. Meta tensors
pass through everything here, which gives names, shapes and sizes before anything is computed.

Shapes: O outputs, I inputs.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mtp_graft.dsv4 import names
from mtp_graft.dsv4.head_shapes import Format, stored_as
from mtp_graft.errors import GraftError
from mtp_graft.quant import fp8_block, int4, mxfp4
from mtp_graft.recipe import Linears, Variant

#: Which of the head's FP8 modules are decoded to BF16 (exact); the others keep their codes. "base"
#: is as in the base, "bf16" as in the published checkpoint.
_DECODED: dict[Linears, tuple[str, ...]] = {
    "fp8": (),
    "base": ("mtp.0.ffn.shared_experts.",),
    "bf16": ("mtp.0.ffn.shared_experts.", "mtp.0.e_proj", "mtp.0.h_proj"),
}

_PARTS = ("weight", "scale", "weight_scale", "weight_packed", "weight_shape")
_INT4_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_FORMATS: dict[frozenset[str], Format] = {
    frozenset(_INT4_PARTS): "int4",
    frozenset({"weight_packed", "weight_scale"}): "mxfp4",  # upstream: weight, scale
    frozenset({"weight", "weight_scale"}): "fp8",  # upstream: weight, scale
    frozenset({"weight"}): "plain",
    frozenset({""}): "plain",  # a parameter that is no module's
}
Parts = Mapping[str, Tensor]


def group_by_module(tensor_names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return module -> part -> full name, modules in the order of their first name.

    `mtp.0.norm.weight` is part `weight` of `mtp.0.norm`; `mtp.0.hc_attn_fn` is its own part "".
    """
    modules: dict[str, dict[str, str]] = {}
    for name in tensor_names:
        module, _, part = name.rpartition(".")
        if part not in _PARTS:
            module, part = name, ""
        modules.setdefault(module, {})[part] = name
    return modules


def is_expert(module: str) -> bool:
    """Return whether a module is a routed expert's matrix."""
    return names.EXPERT.match(f"{module}.weight") is not None


def store_head(
    upstream: Mapping[str, Tensor],
    variant: Variant,
    gptq_experts: Mapping[str, Tensor] | None = None,
    *,
    group_size: int = 128,
    linears: Linears = "base",
) -> dict[str, Tensor]:
    """Return the stored `mtp.0.*` tensors of `variant`, from upstream's or some modules of them.

    Routed experts become what `variant` says. FP8 modules keep their codes or are decoded to BF16
    (exact), as `linears` says. Everything else stays as it is. Raises GraftError for parts that
    are missing or do not fit each other, and for a gptq expert that is not in `gptq_experts`.
    """
    stored: dict[str, Tensor] = {}
    for module, kind, parts in _modules(upstream, group_size):
        expected = ("mxfp4",) if is_expert(module) else ("fp8", "plain")
        if kind not in expected:
            raise GraftError(f"{module}: is {kind}, expected upstream's {' or '.join(expected)}")
        kept = parts
        if kind == "mxfp4":
            kept = _store_expert(module, parts, variant, gptq_experts or {}, group_size)
        elif kind == "fp8" and module.startswith(_DECODED[linears]):
            kept = {"weight": _decode(kind, parts).to(torch.bfloat16)}
        stored |= {f"{module}.{part}" if part else module: t for part, t in kept.items()}
    return stored


def decode_head(stored: Mapping[str, Tensor], *, group_size: int = 128) -> dict[str, Tensor]:
    """Return float32 tensors under plain names, from upstream's or any variant's.

    Raises GraftError for parts that do not fit each other.
    """
    decoded: dict[str, Tensor] = {}
    for module, kind, parts in _modules(stored, group_size):
        decoded[module if "" in parts else f"{module}.weight"] = _decode(kind, parts)
    return decoded


def int4_parts(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return INT4 codes [O, I] and scales [O, I/group] as a checkpoint has them."""
    shape = torch.tensor(codes.shape, dtype=torch.int64)
    return dict(zip(_INT4_PARTS, (int4.pack(codes), scale, shape), strict=True))


def _modules(tensors: Mapping[str, Tensor], group_size: int) -> Iterator[tuple[str, Format, Parts]]:
    """Yield every module with its parts, checked; upstream's get a checkpoint's names (exact)."""
    for module, by_part in group_by_module(tensors).items():
        parts = {part: tensors[name] for part, name in by_part.items()}
        if parts.keys() == {"weight", "scale"}:
            codes, scale = parts["weight"], parts["scale"]
            if codes.dtype in (torch.int8, torch.uint8):
                as_byte = scale.view(torch.uint8) if scale.element_size() == 1 else scale
                parts = {"weight_packed": codes.view(torch.uint8), "weight_scale": as_byte}
            else:  # a power of two is exact in BF16
                parts = {"weight": codes, "weight_scale": scale.to(torch.bfloat16)}
        yield module, _check(module, parts, group_size), parts


def _store_expert(
    module: str,
    parts: Parts,
    variant: Variant,
    gptq_experts: Mapping[str, Tensor],
    group_size: int,
) -> Parts:
    match variant:
        case "mxfp4":
            return parts
        case "bf16":
            return {"weight": _decode("mxfp4", parts).to(torch.bfloat16)}
        case "rtn":
            weight = _decode("mxfp4", parts)
            _expect_whole_groups(module, weight.shape[1], group_size)
            scale = int4.group_scale(weight, group_size)
            return int4_parts(int4.encode(weight, scale), scale)
        case "gptq":
            given = {part: f"{module}.{part}" for part in _INT4_PARTS}
            if missing := [name for name in given.values() if name not in gptq_experts]:
                raise GraftError(
                    f"{missing[0]}: not among the quantized experts; run `quantize` to its end"
                )
            found = {part: gptq_experts[name] for part, name in given.items()}
            _check_matrix(module, "int4", found, _shape("mxfp4", parts), group_size)
            return found


def _decode(kind: Format, parts: Parts) -> Tensor:
    match kind:
        case "plain":
            (tensor,) = parts.values()
            return tensor.float()
        case "int4":
            return int4.decode(int4.unpack(parts["weight_packed"]), parts["weight_scale"])
        case "mxfp4":
            return mxfp4.decode(parts["weight_packed"], parts["weight_scale"])
        case "fp8":
            return fp8_block.decode(parts["weight"], parts["weight_scale"])


def _shape(kind: Format, parts: Parts) -> tuple[int, int]:
    """Return O and I of a matrix by its codes."""
    codes = parts["weight" if kind == "fp8" else "weight_packed"]
    return codes.shape[0], codes.shape[-1] * {"int4": int4.CODES_PER_WORD, "mxfp4": 2}.get(kind, 1)


def _check(module: str, parts: Parts, group_size: int) -> Format:
    """Return the format of a module's parts; raise GraftError if they do not fit each other."""
    kind = _FORMATS.get(frozenset(parts))
    if kind is None:
        raise GraftError(
            f"{module}: has {', '.join(sorted(parts))}; expected a weight with its scale, packed "
            "codes with their scale, or an unquantized weight; a tensor is missing or does not "
            "belong here"
        )
    if kind != "plain":
        _check_matrix(module, kind, parts, _shape(kind, parts), group_size)
        return kind
    (tensor,) = parts.values()
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        raise GraftError(f"{module}: is {tensor.dtype} without a scale; fetch the shard again")
    return kind


def _check_matrix(
    module: str, kind: Format, parts: Parts, shape: tuple[int, int], group_size: int
) -> None:
    """Raise GraftError for parts that are not those of a matrix of `shape`."""
    group = mxfp4.GROUP if kind == "mxfp4" else group_size
    if kind != "fp8":
        _expect_whole_groups(module, shape[1], group)
    for part, like in stored_as("weight", shape, kind, group).items():
        found = parts[part]
        if (found.shape, found.dtype) != (like.shape, like.dtype):
            raise GraftError(
                f"{module}: {part.removeprefix('weight_')} is {list(found.shape)} {found.dtype}, "
                f"expected {list(like.shape)} {like.dtype} (out {shape[0]}, in {shape[1]}, group "
                f"{group}); recipe and checkpoint disagree, or the shard is damaged"
            )
    scale, stored_shape = parts["weight_scale"], parts.get("weight_shape")
    if scale.is_meta:
        return
    if kind == "mxfp4":
        scale = scale.view(torch.float8_e8m0fnu)
    if not torch.isfinite(scale.float()).all():
        raise GraftError(
            f"{module}: has a scale that is not finite; the shard is damaged, fetch it"
        )
    if stored_shape is not None and tuple(stored_shape.tolist()) != shape:
        raise GraftError(f"{module}: weight_shape is {stored_shape.tolist()}, expected {shape}")


def _expect_whole_groups(module: str, inputs: int, group_size: int) -> None:
    if inputs % group_size:
        raise GraftError(
            f"{module}: {inputs} inputs are no multiple of the group size {group_size}; "
            "choose one that divides them"
        )
