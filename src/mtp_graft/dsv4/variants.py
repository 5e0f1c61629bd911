"""The head's variants: from upstream's tensors to what a checkpoint stores, and back to float32.

A module's tensors are its *parts*: `mtp.0.attn.wq_a` has `weight` and `scale` upstream, `weight`
and `weight_scale` in a checkpoint. A parameter that belongs to no such module
(`mtp.0.hc_attn_fn`, `mtp.0.ffn.gate.bias`) counts as one with the single part "".

Shapes: O outputs, I inputs. Meta tensors pass through `store_module` and `store_head` too, which
gives a variant's names, shapes and sizes before anything is read or computed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mtp_graft import recipe
from mtp_graft.dsv4 import names
from mtp_graft.errors import GraftError
from mtp_graft.quant import fp8_block, int4, mxfp4

Variant: TypeAlias = recipe.Variant
#: What the head's FP8 modules become. "fp8": all keep their codes. "base": as in the base, shared
#: experts are BF16. "bf16": e_proj and h_proj are too, as in the published checkpoint. The
#: attention's stay FP8 in any case, and no choice loses anything.
Linears: TypeAlias = recipe.Linears
VARIANTS: tuple[Variant, ...] = get_args(Variant)

Format = Literal["plain", "fp8", "mxfp4", "int4"]
Parts = Mapping[str, Tensor]

_PARTS = ("weight", "scale", "weight_scale", "weight_packed", "weight_shape")
_INT4_PARTS = ("weight_packed", "weight_scale", "weight_shape")


def split_name(name: str) -> tuple[str, str]:
    """Return a tensor's module and part: `mtp.0.norm.weight` is (`mtp.0.norm`, `weight`)."""
    module, _, part = name.rpartition(".")
    return (module, part) if part in _PARTS else (name, "")


def group_by_module(tensor_names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return module -> part -> full name, modules in the order of their first name."""
    modules: dict[str, dict[str, str]] = {}
    for name in tensor_names:
        module, part = split_name(name)
        modules.setdefault(module, {})[part] = name
    return modules


def decoded_name(module: str, parts: Iterable[str]) -> str:
    """Return the plain name that a module's decoded tensor has."""
    return module if "" in parts else f"{module}.weight"


def is_expert(module: str) -> bool:
    """Return whether a module is a routed expert's matrix."""
    return names.EXPERT.match(f"{module}.weight") is not None


# From upstream to the checkpoint


def store_head(
    upstream: Mapping[str, Tensor],
    variant: Variant,
    gptq_experts: Mapping[str, Tensor] | None = None,
    *,
    group_size: int = 128,
    linears: Linears = "base",
) -> dict[str, Tensor]:
    """Return the stored `mtp.0.*` tensors of `variant`, from upstream's.

    Raises GraftError for parts that are missing or do not fit each other, and for a gptq expert
    that is not in `gptq_experts`.
    """
    stored: dict[str, Tensor] = {}
    for module, by_part in group_by_module(upstream).items():
        parts = {part: upstream[name] for part, name in by_part.items()}
        stored |= store_module(
            module, parts, variant, gptq_experts, group_size=group_size, linears=linears
        )
    return stored


def store_module(
    module: str,
    parts: Parts,
    variant: Variant,
    gptq_experts: Mapping[str, Tensor] | None = None,
    *,
    group_size: int = 128,
    linears: Linears = "base",
) -> dict[str, Tensor]:
    """Return what the checkpoint stores of one upstream module, by full name.

    Routed experts become what `variant` says. FP8 modules keep their codes (power-of-two scales
    are exact in BF16) or are decoded to BF16 (exact), as `linears` says. Everything else stays as
    it is. Raises GraftError as `store_head` does.
    """
    kind = _format(module, parts)
    if kind == "plain":
        return {f"{module}.{part}" if part else module: tensor for part, tensor in parts.items()}
    if kind == "mxfp4" and is_expert(module):
        return _store_expert(module, parts, variant, gptq_experts, group_size)
    if kind != "fp8":
        raise GraftError(f"{module}: has {_listed(parts)}; expected upstream's FP8 or MXFP4 format")
    if keeps_fp8(module, linears):
        scale = parts["scale"].to(torch.bfloat16)
        return {f"{module}.weight": parts["weight"], f"{module}.weight_scale": scale}
    exact = fp8_block.decode(parts["weight"], parts["scale"])
    return {f"{module}.weight": exact.to(torch.bfloat16)}


def keeps_fp8(module: str, linears: Linears) -> bool:
    """Return whether one of the head's FP8 modules keeps its codes."""
    if ".shared_experts." in module:
        return linears == "fp8"
    return ".attn." in module or linears != "bf16"


def _store_expert(
    module: str,
    parts: Parts,
    variant: Variant,
    gptq_experts: Mapping[str, Tensor] | None,
    group_size: int,
) -> dict[str, Tensor]:
    codes, scale = parts["weight"], parts["scale"]
    match variant:
        case "gptq":
            shape = [codes.shape[0], 2 * codes.shape[1]]
            return _given_expert(module, shape, gptq_experts or {}, group_size)
        case "mxfp4":
            as_bytes = {"weight_packed": codes, "weight_scale": scale}
            return {f"{module}.{part}": t.view(torch.uint8) for part, t in as_bytes.items()}
        case "bf16":
            return {f"{module}.weight": mxfp4.decode(codes, scale).to(torch.bfloat16)}
        case "rtn":
            return store_int4(module, mxfp4.decode(codes, scale), group_size=group_size)


def store_int4(module: str, weight: Tensor, *, group_size: int = 128) -> dict[str, Tensor]:
    """Return a matrix [O, I] rounded to the nearest INT4, as the checkpoint stores it."""
    _expect_whole_groups(module, weight.shape[-1], group_size)
    scale = int4.group_scale(weight, group_size)
    packed = int4.pack(int4.encode(weight, scale))
    return int4_parts(module, packed, scale, weight.shape)


def int4_parts(
    module: str, packed: Tensor, scale: Tensor, shape: Sequence[int]
) -> dict[str, Tensor]:
    """Return packed codes [O, I/8] and scales [O, I/group] under the names of the checkpoint."""
    tensors = (packed, scale, torch.tensor(shape, dtype=torch.int64))
    return {f"{module}.{part}": t for part, t in zip(_INT4_PARTS, tensors, strict=True)}


def _given_expert(
    module: str, shape: list[int], experts: Mapping[str, Tensor], group_size: int
) -> dict[str, Tensor]:
    for part in _INT4_PARTS:
        if f"{module}.{part}" not in experts:
            raise GraftError(
                f"{module}.{part}: not among the quantized experts; run `quantize` to its end"
            )
    parts = {part: experts[f"{module}.{part}"] for part in _INT4_PARTS}
    _check(module, "int4", parts, shape, group_size)
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


# Back to float32


def decode_head(
    stored: Mapping[str, Tensor],
    wanted: Callable[[str], bool] = lambda _module: True,
    *,
    group_size: int = 128,
) -> dict[str, Tensor]:
    """Return the head in float32 under plain names, from upstream's or any variant's tensors.

    `wanted` chooses modules. Raises GraftError for parts that do not fit each other.
    """
    decoded: dict[str, Tensor] = {}
    for module, by_part in group_by_module(stored).items():
        if wanted(module):
            parts = {part: stored[name] for part, name in by_part.items()}
            decoded[decoded_name(module, parts)] = _decode(module, parts, group_size)
    return decoded


def _decode(module: str, parts: Parts, group_size: int) -> Tensor:
    match _format(module, parts, group_size):
        case "plain":
            (tensor,) = parts.values()
            return tensor.float()
        case "int4":
            return int4.decode(int4.unpack(parts["weight_packed"]), parts["weight_scale"])
        case "mxfp4":
            return mxfp4.decode(*_codes_and_scale(parts))
        case "fp8":
            return fp8_block.decode(*_codes_and_scale(parts))


# What a module's parts are, and whether they fit


def _format(module: str, parts: Parts, group_size: int = 128) -> Format:
    """Return the format of a module's parts, having checked their dtypes and shapes."""
    present = set(parts)
    if present in ({""}, {"weight"}):
        (tensor,) = parts.values()
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise GraftError(f"{module}: is {tensor.dtype} without a scale; fetch the shard again")
        return "plain"
    if present == set(_INT4_PARTS):
        kind: Format = "int4"
    elif present == {"weight_packed", "weight_scale"}:
        kind = "mxfp4"
    elif present in ({"weight", "scale"}, {"weight", "weight_scale"}):
        kind = "mxfp4" if parts["weight"].dtype in (torch.int8, torch.uint8) else "fp8"
    else:
        raise GraftError(
            f"{module}: has {_listed(parts)}; expected a weight with its scale, packed codes with "
            "their scale, or an unquantized weight; a tensor is missing or does not belong here"
        )
    codes, _ = _codes_and_scale(parts)
    codes_per_element = {"int4": int4.CODES_PER_WORD, "mxfp4": 2}.get(kind, 1)
    _check(module, kind, parts, [codes.shape[0], codes_per_element * codes.shape[-1]], group_size)
    return kind


def _codes_and_scale(parts: Parts) -> tuple[Tensor, Tensor]:
    """Return codes and scales; checkpoints store the bytes of E8M0 scales as uint8."""
    codes = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    scale = parts["scale"] if "scale" in parts else parts["weight_scale"]
    return codes, scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale


def _check(module: str, kind: Format, parts: Parts, shape: list[int], group_size: int) -> None:
    """Raise GraftError for parts that are not those of a matrix of `shape` [O, I]."""
    codes, scale = _codes_and_scale(parts)
    outputs, inputs = shape
    where, group = f"out {outputs}, in {inputs}", mxfp4.GROUP if kind == "mxfp4" else group_size
    if kind == "fp8":
        where += f", blocks of {fp8_block.BLOCK}"
        blocks = [-(-size // fp8_block.BLOCK) for size in shape]
        expected = {"weight": (codes, shape, torch.float8_e4m3fn)}
        expected["scale"] = (scale, blocks, scale.dtype)
    else:
        where += f", group {group}"
        _expect_whole_groups(module, inputs, group)
        per_group, scale_dtype = [outputs, inputs // group], torch.float8_e8m0fnu
        packed, codes_dtype = [outputs, inputs // 2], codes.dtype
        if kind == "int4":
            packed, codes_dtype = [outputs, inputs // int4.CODES_PER_WORD], torch.int32
            scale_dtype = torch.bfloat16
        expected = {"codes": (codes, packed, codes_dtype)}
        expected["scale"] = (scale, per_group, scale_dtype)
    for what, (tensor, size, dtype) in expected.items():
        if list(tensor.shape) != size or tensor.dtype != dtype:
            raise GraftError(
                f"{module}: {what} is {list(tensor.shape)} {tensor.dtype}, expected {size} {dtype} "
                f"({where}); recipe and checkpoint disagree, or the shard is damaged"
            )
    if not scale.is_meta and not torch.isfinite(scale.float()).all():
        raise GraftError(
            f"{module}: has a scale that is not finite; the shard is damaged, fetch it"
        )
    stored = parts.get("weight_shape")
    if stored is not None and not stored.is_meta and stored.tolist() != shape:
        raise GraftError(f"{module}: weight_shape is {stored.tolist()}, expected {shape}")


def _expect_whole_groups(module: str, inputs: int, group_size: int) -> None:
    if inputs % group_size:
        raise GraftError(
            f"{module}: {inputs} inputs are no multiple of the group size {group_size}; "
            "choose one that divides them"
        )


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(sorted(part or "a parameter" for part in parts))
