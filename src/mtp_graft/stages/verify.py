"""Verify: read a spliced checkpoint back with other code than what wrote it, and compare.

Engines skip tensors whose name they do not know, and then draft noise. Here all that the config
asks for is decoded (packed experts by compressed-tensors) and compared with what it was made of.
"""

import filecmp
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.files import read_object
from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD
from mtp_graft.checkpoint.quantization_config import read_quantization, with_section
from mtp_graft.checkpoint.shards import read_index
from mtp_graft.dsv4.names import EXPERT, QUANTIZED, head_shapes, served_as
from mtp_graft.dsv4.variants import stored_as
from mtp_graft.errors import GraftError
from mtp_graft.stages.inputs import Tensors, Values, drafter_config, expert_files, read_master
from mtp_graft.stages.splice import base_files, config_with_head, linear_dtype_of

#: Most that an INT4 matrix may have (Frobenius): nearest gives 0.11, GPTQ more, a swapped one 1.
INT4_REL_ERROR = 0.35
#: Nearest rounding misses by half a step; a little more at the end codes, whose scale is rounded.
RTN_STEPS = 0.54
#: compressed-tensors' name for a packed format, its type of numbers, and codes per element.
_PACKED = {"int4": ("pack-quantized", "int", 8), "mxfp4": ("mxfp4-pack-quantized", "float", 2)}
Parts = Mapping[str, Tensor]  # by a part's full name, unless said otherwise


@dataclass
class _Head:
    """A spliced head, what it was made of, and what has been found wrong with it so far."""

    variant: str
    stored: Values
    master: Values  # upstream's; empty if the head was taken as it is
    exact: Values  # what must be found bit for bit: GPTQ's experts, the whole head, or nothing
    accounted: set[str] = field(default_factory=set)
    mismatched: dict[str, str] = field(default_factory=dict)  # name -> why
    rel_error_max: float = 0.0  # of INT4 experts


def verify(
    checkpoint: Path, base: Path, upstream: Path, quantized: Path | None = None
) -> dict[str, Any]:
    """Account for every tensor of a spliced checkpoint; return what was found.

    All values must be finite. Kept or decoded experts and all other tensors must equal upstream's,
    nearest rounding be half a step off at the most, and GPTQ's experts have the bytes in
    `quantized` (if given) and an error below `INT4_REL_ERROR`. A head that was taken as it is must
    have `upstream`'s bytes, config.json the base's content and what the head adds. `rel_error_max`
    (Frobenius, over expert matrices) is None without the master. GraftError for unreadable files.
    """
    manifest = quant_manifest.read_manifest(checkpoint)
    variant, recorded = manifest["variant"], manifest["provenance"].get("base")
    index, base_map = read_index(checkpoint), read_index(base)
    held = Tensors.in_files(checkpoint / shard for shard in sorted(set(index.values())))
    # Engines read what the index lists and its shard holds, and nothing else.
    listed = {name: path for name, path in held.files.items() if index.get(name) == path.name}
    stored = Tensors(listed, held.meta)
    master, exact = _sources(variant, upstream, quantized)
    with stored.opened() as ours, master.opened() as theirs, exact.opened() as same:
        head = _Head(variant, ours, theirs, same)
        _check_head(head, checkpoint)
    missing = {*index, *base_map, *head.accounted} - listed.keys()
    unexpected = held.files.keys() - (listed.keys() & {*base_map, *head.accounted})
    files = {name: _compare(path, checkpoint / name) for name, path in base_files(base).items()}
    is_same = quant_manifest.base_provenance(base, base_map.values()) == recorded
    if is_same:
        read = (read_object(f / "config.json", "a config") for f in (base, checkpoint))
        config, found = map(with_section, read)
        drafter = drafter_config(upstream, master.files or exact.files)
        expected = config_with_head(config, drafter, variant, linear_dtype_of(listed))
        wrong = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        head.mismatched |= {f"config.json: {k}": "is not what splice wrote" for k in wrong}
    unchanged = is_same and set(files.values()) <= {"same inode", "same bytes"}
    return {
        "ok": not (missing or unexpected or head.mismatched) and unchanged,
        "variant": variant,
        "tensors": len(head.accounted & listed.keys()),
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
        "mismatched": [{"tensor": n, "why": w} for n, w in sorted(head.mismatched.items())],
        "rel_error_max": head.rel_error_max if head.master else None,
        "base_files": files,
        "base_files_linked": set(files.values()) <= {"same inode"},
        "base_unchanged": unchanged,
        "loaded_in_vllm": None,
    }


def require_sound(checkpoint: Path, found: Mapping[str, Any]) -> None:
    """Raise GraftError, naming what is wrong, for a checkpoint that `verify` found unsound."""
    if found["ok"]:
        return
    wrong = [f"{m['tensor']} ({m['why']})" for m in found["mismatched"]]
    wrong = [*found["missing"], *found["unexpected"], *wrong]
    what = f"{', '.join(wrong[:3])}: wrong ({len(wrong)} in all); remove it and splice again"
    base = "the base is not the one that it was spliced from; splice again"
    raise GraftError(f"{checkpoint}: {what if wrong else base}")


def _sources(variant: str, upstream: Path, quantized: Path | None) -> tuple[Tensors, Tensors]:
    """Return the upstream head, and what must be found bit for bit; either may be empty."""
    if (upstream / quant_manifest.MANIFEST_NAME).is_file():
        return Tensors(), Tensors.in_files([upstream / HEAD_SHARD])
    experts = expert_files(quantized) if variant == "gptq" and quantized is not None else ()
    return read_master(upstream), Tensors.in_files(experts)


def _check_head(head: _Head, checkpoint: Path) -> None:
    """Compare every tensor that the checkpoint's config asks for with what it was made of."""
    config = read_object(checkpoint / "config.json", "a model config")
    shapes, layer = head_shapes(config), config["num_hidden_layers"]
    quantization = read_quantization(config)
    for name, shape in shapes.items():
        module, kind, group_size = name.removesuffix(".weight"), "plain", 1
        key = quantization.group_of(served_as(module, layer)) if QUANTIZED.match(module) else None
        if key is not None:  # so does vLLM load it
            group = quantization.config_groups[key]
            kind, group_size = group.kind, group.weights.group_size or 1
        if kind not in ("plain", "fp8", *_PACKED):
            head.mismatched[name] = f"the config takes it for {kind}"
            continue
        layout = stored_as(name, shape, kind, group_size)
        head.accounted |= layout.keys()
        if any(part not in head.stored for part in layout):
            continue  # they are missing
        parts = {part: head.stored[part] for part in layout}
        if (why := _wrong(name, parts, layout, kind, head)) is not None:
            head.mismatched[next(iter(layout))] = why
    unknown = [n for n in head.master if n.replace(".scale", ".weight") not in shapes]
    head.mismatched |= dict.fromkeys(unknown, "upstream has it, the config does not ask for it")


def _said(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _wrong(name: str, parts: Parts, layout: Parts, kind: str, head: _Head) -> str | None:
    """Return what is wrong with one of the head's tensors; note an expert's relative error."""
    for part, like in layout.items():
        ours = parts[part]
        if ours.shape != like.shape or (kind != "plain" and ours.dtype != like.dtype):
            return f"{part} is {_said(ours)}, expected {_said(like)}"
        values = _exp2(ours) if part.endswith("_scale") else ours.float()
        if not values.abs().max() < 2.0**100:  # nor are their products, then
            return "holds values that are not finite"
    if head.exact and (EXPERT.match(name) or not head.master):
        for part, ours in parts.items():
            theirs = head.exact.get(part)
            if theirs is None or not _same(ours, theirs):
                return f"{part}: differs from what it was spliced from"
    if not head.master:
        return None
    if name not in head.master:
        return "upstream has no such tensor"
    if kind == "int4":
        return _wrong_int4(name, parts, head)
    expected = _master_values(name, head.master) if kind == "plain" else head.master[name]
    same = _same(parts[name], expected) if kind == "plain" else _is_kept(name, parts, head.master)
    return None if same else f"differs from upstream's {_said(expected)}"


def _is_kept(name: str, parts: Parts, master: Values) -> bool:
    """Return whether codes and scales are upstream's."""
    (codes, scale), exponents = parts.values(), master.get(f"{name.removesuffix('.weight')}.scale")
    same_codes = _same(codes.view(torch.uint8), master[name].view(torch.uint8))
    return same_codes and exponents is not None and _same(_exp2(scale), _exp2(exponents))


def _decompress(parts: Parts, kind: str) -> Tensor:
    name, number, codes = _PACKED[kind]
    group_size = parts["weight_packed"].shape[1] * codes // parts["weight_scale"].shape[1]
    args = QuantizationArgs(num_bits=4, type=number, strategy="group", group_size=group_size)
    compressor = BaseCompressor.get_value_from_registry(name)
    scheme = QuantizationScheme(targets=[], weights=args)
    values: Tensor = compressor.decompress(dict(parts), scheme)["weight"]
    return values.float()


def _decode_mxfp4(codes: Tensor, exponents: Tensor) -> Tensor:
    """Return BF16 [O, I], which is exact."""
    pairs = _pairs_of_bytes().index_select(0, codes.view(torch.uint8).flatten().int())
    groups = pairs.view(torch.bfloat16).unflatten(0, (*exponents.shape, 32))
    return (groups * _exp2(exponents).bfloat16()[..., None]).flatten(1)


@cache
def _pairs_of_bytes() -> Tensor:
    """Return the bits of the two BF16 values in each byte, by compressed-tensors: int32 [256]."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    one = torch.full((256, 1), 127, dtype=torch.uint8)
    values = _decompress({"weight_packed": codes, "weight_scale": one}, "mxfp4")
    return values[:, :2].bfloat16().view(torch.int32).flatten()


def _exp2(exponents: Tensor) -> Tensor:
    """Return the float32 values of E8M0 scales, by its definition, or of other floats."""
    if exponents.element_size() > 1:
        return exponents.float()
    return torch.exp2(exponents.view(torch.uint8).float() - 127)


def _master_values(name: str, master: Values) -> Tensor:
    """Return what upstream has: its tensor, or its MXFP4 or FP8 codes decoded, in BF16."""
    weight, scale = master[name], master.get(f"{name.removesuffix('.weight')}.scale")
    if scale is None:
        return weight
    if EXPERT.match(name):
        return _decode_mxfp4(weight, scale)
    rows, columns = (torch.arange(size) // 128 for size in weight.shape)  # of FP8's scales
    return (weight.float() * _exp2(scale)[rows[:, None], columns]).bfloat16()


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    a, b = (t.contiguous().flatten().view(torch.uint8) for t in (ours, theirs))
    return torch.equal(a, b)


def _wrong_int4(name: str, parts: Parts, head: _Head) -> str | None:
    scale, shape = parts[f"{name}_scale"].float(), parts[f"{name}_shape"].tolist()
    packed = {part.replace(name, "weight"): t for part, t in parts.items()}
    # They are multiplied in the scale's dtype, which must not round.
    values = _decompress({**packed, "weight_scale": scale}, "int4")
    if shape != list(values.shape):
        return f"weight_shape is {shape}, expected {list(values.shape)}"
    exact = _master_values(name, head.master)
    error = values - exact
    wrong, whole = (float(t.float().square().sum()) ** 0.5 for t in (error, exact))
    rel_error = wrong / whole if whole else wrong
    head.rel_error_max = max(head.rel_error_max, rel_error)
    if rel_error > INT4_REL_ERROR:
        return f"relative error {rel_error:.3g}, expected at most {INT4_REL_ERROR}"
    if head.variant != "rtn":
        return None
    step = scale.repeat_interleave(error.shape[1] // scale.shape[1], dim=1)
    steps = float((error.abs() / step).max())
    return None if steps <= RTN_STEPS else f"is {steps:.2f} steps off, expected {RTN_STEPS}"


def _compare(source: Path, target: Path) -> str:
    """Return how a base's file is found; one that is not linked is read whole."""
    if not target.exists():
        return "missing"
    if os.path.samefile(source, target):
        return "same inode"
    return "same bytes" if filecmp.cmp(source, target, shallow=False) else "differs"
