"""The head's variants: from upstream's tensors to what a checkpoint stores, and back to float32.

A *stem* is a tensor name without its part: `mtp.0.attn.wq_a` has the parts `weight` and `scale`
upstream, `weight` and `weight_scale` in a checkpoint. A parameter that has no parts
(`mtp.0.hc_attn_fn`, `mtp.0.ffn.gate.bias`) is its own stem, with the single part "".

Shape legend: O outputs, I inputs. Meta tensors pass through `store_tensor` and `store_head`
too, which gives a variant's names, shapes and sizes before anything is read or computed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mtp_graft import recipe
from mtp_graft.dsv4 import names
from mtp_graft.errors import GraftError
from mtp_graft.quant import fp8_block, int4, mxfp4

Variant: TypeAlias = recipe.Variant
#: What the head's FP8 linears become. "fp8": all keep their codes. "base": as in the base, shared
#: experts are BF16. "bf16": e_proj and h_proj are too, as in the published checkpoint. The
#: attention's stay FP8 in any case, and no choice loses anything.
Linears: TypeAlias = recipe.Linears
VARIANTS: tuple[Variant, ...] = get_args(Variant)
#: Inputs per INT4 scale, unless the caller says otherwise.
GROUP_SIZE = 128

_PARTS = ("weight", "scale", "weight_scale", "weight_packed", "weight_shape")
_INT4_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_E4M3 = torch.float8_e4m3fn


def split_name(name: str) -> tuple[str, str]:
    """Return a tensor's stem and part: `mtp.0.norm.weight` is (`mtp.0.norm`, `weight`)."""
    stem, _, part = name.rpartition(".")
    return (stem, part) if part in _PARTS else (name, "")


def group_by_stem(tensor_names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return stem -> part -> full name, stems in the order of their first name."""
    stems: dict[str, dict[str, str]] = {}
    for name in tensor_names:
        stem, part = split_name(name)
        stems.setdefault(stem, {})[part] = name
    return stems


def decoded_name(stem: str, parts: Iterable[str]) -> str:
    """Return the plain name that the decoded tensor of a stem has."""
    return stem if "" in parts else f"{stem}.weight"


def is_expert(stem: str) -> bool:
    """Say whether a stem is a routed expert's matrix."""
    return names.EXPERT.match(f"{stem}.weight") is not None


# From upstream to the checkpoint


def store_head(
    upstream: Mapping[str, Tensor],
    variant: Variant,
    gptq_experts: Mapping[str, Tensor] | None = None,
    *,
    group_size: int = GROUP_SIZE,
    linears: Linears = "base",
) -> dict[str, Tensor]:
    """Return the stored `mtp.0.*` tensors of `variant`, from upstream's.

    Raises GraftError for parts that are missing or do not fit each other, and for a gptq expert
    that is not in `gptq_experts`.
    """
    stored: dict[str, Tensor] = {}
    for stem, by_part in group_by_stem(upstream).items():
        parts = {part: upstream[name] for part, name in by_part.items()}
        stored.update(
            store_tensor(stem, parts, variant, gptq_experts, group_size=group_size, linears=linears)
        )
    return stored


def store_tensor(
    stem: str,
    parts: Mapping[str, Tensor],
    variant: Variant,
    gptq_experts: Mapping[str, Tensor] | None = None,
    *,
    group_size: int = GROUP_SIZE,
    linears: Linears = "base",
) -> dict[str, Tensor]:
    """Return what the checkpoint stores of one upstream stem, by full name.

    Routed experts become what `variant` says. FP8 linears keep their codes (power-of-two scales
    are exact in BF16) or are decoded to BF16 (exact), as `linears` says. Everything else stays as
    it is. Raises GraftError as `store_head` does.
    """
    kind = _kind(stem, parts)
    if kind == "plain":
        return {f"{stem}.{part}" if part else stem: tensor for part, tensor in parts.items()}
    if kind == "mxfp4" and is_expert(stem):
        return _store_expert(stem, parts, variant, gptq_experts, group_size)
    if kind != "fp8":
        raise GraftError(f"{stem}: has {_listed(parts)}; expected upstream's FP8 or MXFP4 format")
    if not keeps_fp8(stem, linears):
        exact = fp8_block.decode(parts["weight"], parts["scale"])
        return {f"{stem}.weight": exact.to(torch.bfloat16)}
    scale = parts["scale"].to(torch.bfloat16)
    return {f"{stem}.weight": parts["weight"], f"{stem}.weight_scale": scale}


def keeps_fp8(stem: str, linears: Linears) -> bool:
    """Say whether one of the head's FP8 linears keeps its codes."""
    if ".shared_experts." in stem:
        return linears == "fp8"
    return ".attn." in stem or linears != "bf16"


def _store_expert(
    stem: str,
    parts: Mapping[str, Tensor],
    variant: Variant,
    gptq_experts: Mapping[str, Tensor] | None,
    group_size: int,
) -> dict[str, Tensor]:
    codes, scale = parts["weight"], parts["scale"]
    if variant == "gptq":
        shape = [codes.shape[0], 2 * codes.shape[1]]
        return _given_expert(stem, shape, gptq_experts or {}, group_size)
    if variant == "mxfp4":
        return {
            f"{stem}.weight_packed": codes.view(torch.uint8),
            f"{stem}.weight_scale": scale.view(torch.uint8),
        }
    weight = mxfp4.decode(codes, scale)  # [O, I] f32
    if variant == "bf16":
        return {f"{stem}.weight": weight.to(torch.bfloat16)}
    return store_int4(stem, weight, group_size=group_size)


def store_int4(stem: str, weight: Tensor, *, group_size: int = GROUP_SIZE) -> dict[str, Tensor]:
    """Return a matrix [O, I] rounded to the nearest INT4, as the checkpoint stores it."""
    _expect_whole_groups(stem, weight.shape[-1], group_size)
    scale = int4.group_scale(weight, group_size)
    packed = int4.pack(int4.encode(weight, scale))
    return int4_parts(stem, packed, scale, weight.shape)


def int4_parts(stem: str, packed: Tensor, scale: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    """Return packed codes [O, I/8] and scales [O, I/group] under the names of the checkpoint."""
    return {
        f"{stem}.weight_packed": packed,
        f"{stem}.weight_scale": scale,
        f"{stem}.weight_shape": torch.tensor(shape, dtype=torch.int64),
    }


def _given_expert(
    stem: str, shape: list[int], experts: Mapping[str, Tensor], group_size: int
) -> dict[str, Tensor]:
    given = {f"{stem}.{part}": experts.get(f"{stem}.{part}") for part in _INT4_PARTS}
    found = {name: tensor for name, tensor in given.items() if tensor is not None}
    if len(found) < len(given):
        missing = next(name for name in given if name not in found)
        raise GraftError(f"{missing}: not among the quantized experts; run `quantize` to its end")
    packed, scale, shape_tensor = found.values()
    _expect(stem, "packed", packed, [shape[0], shape[1] // 8], torch.int32, f"in {shape[1]}")
    _expect_int4_scale(stem, scale, shape, group_size)
    if not shape_tensor.is_meta and shape_tensor.tolist() != shape:
        raise GraftError(f"{stem}: weight_shape is {shape_tensor.tolist()}, expected {shape}")
    return found


# Back to float32


def decode_tensor(
    stem: str, parts: Mapping[str, Tensor], *, group_size: int = GROUP_SIZE
) -> Tensor:
    """Return the float32 tensor that the parts of a stem stand for, in whatever format they are.

    Parts are named as `split_name` names them: upstream's or a checkpoint's. Raises GraftError if
    they do not fit each other.
    """
    match _kind(stem, parts, group_size):
        case "plain":
            (tensor,) = parts.values()
            return tensor.float()
        case "int4":
            return int4.decode(int4.unpack(parts["weight_packed"]), parts["weight_scale"])
        case "mxfp4":
            codes, scale = _mxfp4_parts(parts)
            return mxfp4.decode(codes, scale)
        case "fp8":
            return fp8_block.decode(parts["weight"], _fp8_scale(parts))


def decode_head(
    stored: Mapping[str, Tensor],
    wanted: Callable[[str], bool] = lambda _stem: True,
    *,
    group_size: int = GROUP_SIZE,
) -> dict[str, Tensor]:
    """Return the head in float32 under plain names, from upstream's or any variant's tensors.

    `wanted` chooses stems; use `iterate_decoded` where the whole head (24 GiB at full size) is
    too much. Raises GraftError for parts that do not fit each other.
    """
    return dict(iterate_decoded(stored, wanted, group_size=group_size))


def iterate_decoded(
    stored: Mapping[str, Tensor],
    wanted: Callable[[str], bool] = lambda _stem: True,
    *,
    group_size: int = GROUP_SIZE,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (plain name, float32 tensor) one after the other; `stored` is read as needed."""
    for stem, by_part in group_by_stem(stored).items():
        if wanted(stem):
            parts = {part: stored[name] for part, name in by_part.items()}
            yield decoded_name(stem, parts), decode_tensor(stem, parts, group_size=group_size)


# What a stem's parts are, and whether they fit


def _kind(
    stem: str, parts: Mapping[str, Tensor], group_size: int = GROUP_SIZE
) -> Literal["plain", "fp8", "mxfp4", "int4"]:
    """Return the format of a stem's parts, having checked their dtypes and shapes."""
    present = set(parts)
    if present in ({""}, {"weight"}):
        (tensor,) = parts.values()
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise GraftError(f"{stem}: is {tensor.dtype} without a scale; fetch the shard again")
        return "plain"
    if present == set(_INT4_PARTS):
        _check_int4(stem, parts, group_size)
        return "int4"
    if present == {"weight_packed", "weight_scale"} or (
        present == {"weight", "scale"} and parts["weight"].dtype in (torch.int8, torch.uint8)
    ):
        _check_mxfp4(stem, *_mxfp4_parts(parts))
        return "mxfp4"
    if present in ({"weight", "scale"}, {"weight", "weight_scale"}):
        _check_fp8(stem, parts["weight"], _fp8_scale(parts))
        return "fp8"
    raise GraftError(
        f"{stem}: has {_listed(parts)}; expected a weight with its scale, packed codes with their "
        "scale, or an unquantized weight; a tensor is missing or does not belong here"
    )


def _mxfp4_parts(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return codes and E8M0 scales; checkpoints store the scales' bytes as uint8."""
    if "weight_packed" not in parts:
        return parts["weight"], parts["scale"]
    scale = parts["weight_scale"]
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return parts["weight_packed"], scale


def _fp8_scale(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["scale"] if "scale" in parts else parts["weight_scale"]


def _check_int4(stem: str, parts: Mapping[str, Tensor], group_size: int) -> None:
    packed, scale, shape = (parts[part] for part in _INT4_PARTS)
    outputs, inputs = packed.shape[0], 8 * packed.shape[-1]
    _expect(stem, "packed", packed, [outputs, inputs // 8], torch.int32, f"in {inputs}")
    _expect_int4_scale(stem, scale, [outputs, inputs], group_size)
    if shape.tolist() != [outputs, inputs]:
        raise GraftError(f"{stem}: weight_shape is {shape.tolist()}, expected {[outputs, inputs]}")


def _expect_int4_scale(stem: str, scale: Tensor, shape: list[int], group_size: int) -> None:
    outputs, inputs = shape
    _expect_whole_groups(stem, inputs, group_size)
    where = f"in {inputs}, group {group_size}"
    _expect(stem, "scale", scale, [outputs, inputs // group_size], torch.bfloat16, where)
    _expect_finite(stem, scale)


def _expect_whole_groups(stem: str, inputs: int, group_size: int) -> None:
    if inputs % group_size:
        raise GraftError(
            f"{stem}: {inputs} inputs are no multiple of the group size {group_size}; "
            "choose one that divides them"
        )


def _check_mxfp4(stem: str, codes: Tensor, scale: Tensor) -> None:
    outputs, inputs = codes.shape[0], 2 * codes.shape[-1]
    _expect(stem, "codes", codes, [outputs, inputs // 2], codes.dtype, f"in {inputs}")
    _expect_whole_groups(stem, inputs, mxfp4.GROUP)
    expected = [outputs, inputs // mxfp4.GROUP]
    where = f"in {inputs}, group {mxfp4.GROUP}"
    _expect(stem, "scale", scale, expected, torch.float8_e8m0fnu, where)
    _expect_finite(stem, scale)


def _check_fp8(stem: str, codes: Tensor, scale: Tensor) -> None:
    outputs, inputs = codes.shape[0], codes.shape[-1]
    _expect(stem, "weight", codes, [outputs, inputs], _E4M3, f"out {outputs}, in {inputs}")
    blocks = [-(-outputs // fp8_block.BLOCK), -(-inputs // fp8_block.BLOCK)]
    where = f"out {outputs}, in {inputs}, blocks of {fp8_block.BLOCK}"
    _expect(stem, "scale", scale, blocks, scale.dtype, where)
    _expect_finite(stem, scale)


def _expect(
    stem: str, what: str, found: Tensor, shape: list[int], dtype: torch.dtype, where: str
) -> None:
    if list(found.shape) != shape or found.dtype != dtype:
        raise GraftError(
            f"{stem}: {what} is {list(found.shape)} {found.dtype}, expected {shape} {dtype} "
            f"({where}); recipe and checkpoint disagree, or the shard is damaged"
        )


def _expect_finite(stem: str, scale: Tensor) -> None:
    if not scale.is_meta and not torch.isfinite(scale.float()).all():
        raise GraftError(f"{stem}: has a scale that is not finite; the shard is damaged, fetch it")


def _listed(parts: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted(part or "a parameter" for part in parts))
