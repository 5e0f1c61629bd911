"""The head's variants: from upstream's tensors to what a checkpoint stores, and back to float32.

Meta tensors pass through everything here, which gives names, shapes and sizes before anything is
computed.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mtp_graft.dsv4 import formats
from mtp_graft.dsv4.formats import Format, Parts, decode, part_name, shape_of, stored_as
from mtp_graft.dsv4.names import EXPERT
from mtp_graft.errors import GraftError
from mtp_graft.quant import MXFP4_GROUP, int4
from mtp_graft.recipe import Linears, Variant

#: Which of the head's FP8 modules are decoded to BF16 (exact); the others keep their codes. "base"
#: is as in the base, "bf16" as in the published checkpoint.
_DECODED: dict[Linears, tuple[str, ...]] = {
    "fp8": (),
    "base": ("mtp.0.ffn.shared_experts.",),
    "bf16": ("mtp.0.ffn.shared_experts.", "mtp.0.e_proj", "mtp.0.h_proj"),
}


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
        expected = ("mxfp4",) if EXPERT.match(module) else ("fp8", "plain")
        if kind not in expected:
            raise GraftError(f"{module}: is {kind}, expected upstream's {' or '.join(expected)}")
        kept = parts
        if kind == "mxfp4":
            kept = _store_expert(module, parts, variant, gptq_experts or {}, group_size)
        elif kind == "fp8" and module.startswith(_DECODED[linears]):
            kept = {"weight": decode(kind, parts).to(torch.bfloat16)}
        stored |= {part_name(module, part): tensor for part, tensor in kept.items()}
    return stored


def decode_head(stored: Mapping[str, Tensor], *, group_size: int = 128) -> dict[str, Tensor]:
    """Return float32 tensors under plain names, from upstream's or any variant's.

    Raises GraftError for parts that do not fit each other.
    """
    return {
        module if "" in parts else f"{module}.weight": decode(kind, parts)
        for module, kind, parts in _modules(stored, group_size)
    }


def _modules(tensors: Mapping[str, Tensor], group_size: int) -> Iterator[tuple[str, Format, Parts]]:
    """Yield every module with its parts, checked; upstream's get a checkpoint's names (exact)."""
    for module, found in formats.modules_of(tensors).items():
        parts = _renamed(found)
        kind, values = formats.format_of(parts), [*parts.values()]
        is_plain = kind == "plain" and len(values) == 1 and values[0].is_floating_point()
        if kind is None or (kind == "plain" and not is_plain):
            raise GraftError(
                f"{module}: has {_said(parts)}; expected a weight with its scale, packed codes "
                "with theirs, or an unquantized weight; a tensor is missing or belongs elsewhere"
            )
        if kind != "plain":
            _check_matrix(module, kind, parts, shape_of(parts), group_size)
        _expect_finite(module, parts)
        yield module, kind, parts


def _renamed(parts: Parts) -> Parts:
    if parts.keys() != {"weight", "scale"}:
        return parts
    codes, scale = parts["weight"], parts["scale"]
    if codes.dtype not in (torch.int8, torch.uint8):  # a power of two is exact in BF16
        return {"weight": codes, "weight_scale": scale.to(torch.bfloat16)}
    as_byte = scale.view(torch.uint8) if scale.element_size() == 1 else scale
    return {"weight_packed": codes.view(torch.uint8), "weight_scale": as_byte}


def _store_expert(
    module: str, parts: Parts, variant: Variant, gptq_experts: Mapping[str, Tensor], group_size: int
) -> Parts:
    shape = shape_of(parts)
    layout = stored_as("weight", shape, "int4", group_size)
    match variant:
        case "mxfp4":
            return parts
        case "bf16":
            return {"weight": decode("mxfp4", parts).to(torch.bfloat16)}
        case "rtn":
            _expect_whole_groups(module, shape[1], group_size)
            if parts["weight_packed"].is_meta:  # computing without values takes seconds for a head
                return layout
            weight = decode("mxfp4", parts)
            scale = int4.group_scale(weight, group_size)
            return formats.int4_parts(int4.encode(weight, scale), scale)
        case "gptq":
            names = {part: part_name(module, part) for part in layout}
            if missing := [name for name in names.values() if name not in gptq_experts]:
                raise GraftError(
                    f"{missing[0]}: not among the quantized experts; run `quantize` to its end"
                )
            found = {part: gptq_experts[name] for part, name in names.items()}
            _check_matrix(module, "int4", found, shape, group_size)
            _expect_finite(module, found)
            return found


def _check_matrix(
    module: str, kind: Format, parts: Parts, shape: tuple[int, int], group_size: int
) -> None:
    """Raise GraftError for parts that are not those of a matrix of `shape`."""
    group = MXFP4_GROUP if kind == "mxfp4" else group_size
    if kind != "fp8":
        _expect_whole_groups(module, shape[1], group)
    found, expected = _said(parts), _said(stored_as("weight", shape, kind, group))
    if found != expected:
        raise GraftError(
            f"{module}: has {found}, expected {expected} (out {shape[0]}, in {shape[1]}, group "
            f"{group}); recipe and checkpoint disagree, or a shard is damaged: fetch it again"
        )
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
        if values.is_meta or not values.is_floating_point():
            continue
        if not torch.stack(values.float().aminmax()).isfinite().all():
            what = "a scale" if "scale" in part else "a value"
            raise GraftError(f"{module}: has {what} that is not finite; fetch the shard again")


def _expect_whole_groups(module: str, inputs: int, group_size: int) -> None:
    if inputs % group_size:
        raise GraftError(
            f"{module}: {inputs} inputs are no multiple of the group size {group_size}; "
            "choose one that divides them"
        )
