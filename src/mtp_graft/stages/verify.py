"""Verify: read a spliced checkpoint back with other code than what wrote it, and compare.

Engines skip tensors whose name they do not know, and then draft noise. Here every tensor that the
checkpoint's own config asks for is read, decompressed by compressed-tensors under that config, and
compared with what it was made of.
"""

import filecmp
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.utils.match import match_name
from torch import Tensor

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.files import read_object
from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD
from mtp_graft.checkpoint.shards import Shard, read_index
from mtp_graft.dsv4.head_shapes import head_shapes, stored_as
from mtp_graft.errors import GraftError
from mtp_graft.stages.quantize import GPTQ
from mtp_graft.stages.splice import base_files

#: Largest relative error (Frobenius) that an INT4 matrix may have: nearest rounding in groups of
#: 128 gives about 0.11, GPTQ more. A swapped or doubled matrix has 1 or more.
INT4_REL_ERROR = 0.35
#: Nearest rounding misses by half a step; a little more at the end codes, whose scale is rounded.
RTN_STEPS = 0.54

_HEAD, _EXPERTS = "mtp.0.", "mtp.0.ffn.experts."
_FP8, _INT4, _MXFP4 = "float-quantized", "pack-quantized", "mxfp4-pack-quantized"
_KINDS = {_FP8: "fp8", _INT4: "int4", _MXFP4: "mxfp4"}
#: Upstream's routed experts.
_UPSTREAM_MXFP4 = {
    "format": _MXFP4,
    "targets": [],
    "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
}
Scheme = Mapping[str, Any]  # a group of the checkpoint's quantization config


class _Folder:
    """Tensors by name: those that the index and the shard it names both have."""

    def __init__(self, weight_map: Mapping[str, str], folder: Path, stack: ExitStack) -> None:
        paths = {shard: folder / shard for shard in sorted(set(weight_map.values()))}
        opened = {s: stack.enter_context(Shard(path)) for s, path in paths.items()}
        held = {(s, name) for s, file in opened.items() for name in file.meta}
        self.files = {name: opened[s] for name, s in weight_map.items() if (s, name) in held}
        self.listed_only = weight_map.keys() - self.files.keys()
        self.held_only = {name for s, name in held if weight_map.get(name) != s}

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor: Tensor = self.files[name].get_tensor(name)
        return tensor


@dataclass(frozen=True)
class _Origin:
    """What the head was made of."""

    variant: str
    upstream: _Folder | None  # the master, unless the head was taken as it is
    exact: _Folder | None  # what must be found bit for bit: GPTQ's experts, or the whole head


@dataclass
class _Findings:
    """What has been found wrong so far, and the largest error of what was right."""

    missing: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    mismatched: dict[str, str] = field(default_factory=dict)  # name -> why
    checked: int = 0
    rel_error_max: float = 0.0


def verify(
    checkpoint: Path, base: Path, upstream: Path, quantized: Path | None = None
) -> dict[str, Any]:
    """Account for every tensor of a spliced checkpoint; return what was found.

    All values must be finite. Kept or decoded experts and all other tensors must equal upstream's,
    nearest rounding be half a step off at the most, and GPTQ's experts have the bytes in
    `quantized` (if given) and an error below `INT4_REL_ERROR`. A head that was taken as it is from
    a folder `upstream` must have its bytes. The keys are `ok`, `tensors`, `missing`, `unexpected`,
    `mismatched` ([{tensor, why}]), `rel_error_max` (over expert matrices, Frobenius; None without
    the master), `base_files` (name -> `same inode`, `same bytes`, `differs` or `missing`),
    `base_files_linked`, `base_unchanged`, and `loaded_in_vllm`, None: that is seen when the
    checkpoint is served. Raises GraftError for files that cannot be read.
    """
    manifest, found = quant_manifest.read_manifest(checkpoint), _Findings()
    config = read_object(checkpoint / "config.json", "a model config")
    with ExitStack() as stack:
        stored = _Folder(read_index(checkpoint), checkpoint, stack)
        base_map = read_index(base)
        found.missing |= stored.listed_only | (base_map.keys() - stored.files.keys())
        # What a shard holds and the index does not list: no engine will read it.
        found.unexpected |= stored.held_only
        head = {name for name in stored.files if name.startswith(_HEAD)}
        found.unexpected |= stored.files.keys() - head - base_map.keys()
        origin = _open_origin(manifest["variant"], upstream, quantized, stack)
        found.unexpected |= head - _check_head(stored, origin, config, found)
    files = _compare_base_files(checkpoint, base)
    recorded = quant_manifest.base_provenance(base, base_map.values())
    unchanged = set(files.values()) <= {"same inode", "same bytes"}
    unchanged = unchanged and manifest["provenance"].get("base") == recorded
    return {
        "ok": not (found.missing or found.unexpected or found.mismatched) and unchanged,
        "variant": manifest["variant"],
        "tensors": found.checked,
        "missing": sorted(found.missing),
        "unexpected": sorted(found.unexpected),
        "mismatched": [{"tensor": n, "why": w} for n, w in sorted(found.mismatched.items())],
        "rel_error_max": found.rel_error_max if origin.upstream else None,
        "base_files": files,
        "base_files_linked": set(files.values()) <= {"same inode"},
        "base_unchanged": unchanged,
        "loaded_in_vllm": None,
    }


def require_sound(checkpoint: Path, found: Mapping[str, Any]) -> None:
    """Raise GraftError, naming what is wrong, for a checkpoint that `verify` found unsound."""
    if found["ok"]:
        return
    wrong = [*found["missing"], *found["unexpected"]]
    wrong += [f"{m['tensor']} ({m['why']})" for m in found["mismatched"]]
    what = f"{len(wrong)} tensors are wrong: {', '.join(wrong[:3])}; remove it and splice again"
    if not wrong:
        what = "the base is not the one that it was spliced from; splice again"
    raise GraftError(f"{checkpoint}: {what}")


def _open_origin(variant: str, upstream: Path, quantized: Path | None, stack: ExitStack) -> _Origin:
    if (upstream / quant_manifest.MANIFEST_NAME).is_file():
        return _Origin(variant, None, _open_files([upstream / HEAD_SHARD], stack))
    master = _Folder(read_index(upstream, _HEAD), upstream, stack)
    if variant != "gptq" or quantized is None:
        return _Origin(variant, master, None)
    files = sorted((quantized / GPTQ).glob("experts-*.safetensors"))
    if not files:
        raise GraftError(f"{quantized / GPTQ}: has no experts-*.safetensors; run quantize")
    return _Origin(variant, master, _open_files(files, stack))


def _open_files(paths: Iterable[Path], stack: ExitStack) -> _Folder:
    held: dict[str, str] = {}
    for path in paths:
        with Shard(path) as tensors:
            held.update(dict.fromkeys(tensors.meta, path.name))
    return _Folder(held, path.parent, stack)


# The head's values


def _check_head(
    stored: _Folder, origin: _Origin, config: Mapping[str, Any], found: _Findings
) -> set[str]:
    """Compare every tensor that the config asks for with what it was made of; return the names."""
    shapes, accounted = head_shapes(config), set[str]()
    for name, shape in shapes.items():
        is_matrix = name.endswith(".weight") and len(shape) == 2
        scheme = _scheme_of(name, config) if is_matrix else None
        layout = _layout(name, shape, scheme)
        accounted |= layout.keys()
        if absent := layout.keys() - stored.files.keys():
            found.missing |= absent
            continue
        parts = {part: stored.get(part) for part in layout}
        found.checked += len(parts)
        if why := _wrong_layout(parts, layout, scheme) or _wrong_values(
            name, parts, scheme, origin, found
        ):
            found.mismatched[next(iter(layout))] = why
    theirs = origin.upstream.files if origin.upstream else {}
    found.missing |= {n for n in theirs if n.replace(".scale", ".weight") not in shapes}
    return accounted


def _scheme_of(name: str, config: Mapping[str, Any]) -> Scheme | None:
    """Return the config group that covers `mtp.0.ffn.experts.0.w1.weight`, say; None if none."""
    quantization = config["quantization_config"]
    stem = name.removeprefix(_HEAD).removesuffix(".weight")
    module = f"model.layers.{config['num_hidden_layers']}.{stem}"  # vLLM's name for it
    if any(match_name(module, pattern) for pattern in quantization.get("ignore", [])):
        return None
    groups: list[Scheme] = list(quantization["config_groups"].values())
    return next((g for g in groups if any(match_name(module, t) for t in g["targets"])), None)


def _layout(name: str, shape: tuple[int, ...], scheme: Scheme | None) -> dict[str, Tensor]:
    """Return meta tensors like those that are stored of one of the head's."""
    kind = "plain" if scheme is None else _KINDS[scheme["format"]]
    weights = (scheme or {}).get("weights") or {}
    return stored_as(name, shape, kind, weights.get("group_size") or 1)


def _wrong_layout(
    parts: Mapping[str, Tensor], layout: Mapping[str, Tensor], scheme: Scheme | None
) -> str | None:
    for name, like in layout.items():
        ours = parts[name]
        if ours.shape != like.shape or (scheme is not None and ours.dtype != like.dtype):
            return f"{name} is {_said(ours)}, expected {_said(like)}"
    return None


def _said(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _wrong_values(
    name: str,
    parts: Mapping[str, Tensor],
    scheme: Scheme | None,
    origin: _Origin,
    found: _Findings,
) -> str | None:
    """Return what is wrong with one of the head's tensors; note an expert's relative error."""
    is_expert, upstream = name.startswith(_EXPERTS), origin.upstream
    values = _decode({n.replace(name, "weight"): t for n, t in parts.items()}, scheme)
    if not torch.isfinite(values).all():
        return "holds values that are not finite"
    shape = parts.get(f"{name}_shape")
    if shape is not None and shape.tolist() != list(values.shape):
        return f"weight_shape is {shape.tolist()}, expected {list(values.shape)}"
    if origin.exact is not None and (is_expert or upstream is None):
        for part, ours in parts.items():
            if part not in origin.exact.files:
                return f"{part}: not in what it was spliced from"
            if why := _difference(ours, origin.exact.get(part)):
                return f"{part}: {why}"
    if upstream is None:
        return None
    if name not in upstream.files:
        return "upstream has no such tensor"
    scale_name = name.removesuffix("weight") + "scale"
    if scale_name not in upstream.files:
        return _difference(parts[name], upstream.get(name))
    exact = _upstream_values(upstream.get(name), upstream.get(scale_name), is_expert)
    if scheme is None and (why := _difference(values, exact.to(torch.bfloat16))):
        return why
    if is_expert:
        return _wrong_expert(values, exact, parts.get(f"{name}_scale"), scheme, origin, found)
    return None if torch.equal(values.float(), exact) else "its values differ from upstream's"


def _decode(parts: Mapping[str, Tensor], scheme: Scheme | None) -> Tensor:
    """Return a stored tensor's values; those of packed experts as compressed-tensors reads them."""
    if scheme is None:
        (tensor,) = parts.values()
        return tensor
    scale = parts["weight_scale"]
    if scale.is_floating_point():  # they are multiplied in its dtype, which must not round
        scale = scale.float()
    if scheme["format"] == _FP8:
        return _decode_fp8(parts["weight"], scale)
    weights = QuantizationArgs.model_validate(scheme["weights"])
    theirs = QuantizationScheme(targets=scheme["targets"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(scheme["format"])
    values: Tensor = compressor.decompress({**parts, "weight_scale": scale}, theirs)["weight"]
    return values.float()


def _decode_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """Return float32 [O, I]; the row and the column of a weight, over 128, are its scale's."""
    rows, columns = (torch.arange(size) // 128 for size in codes.shape)
    return codes.float() * scale[rows[:, None], columns]


def _upstream_values(codes: Tensor, scale: Tensor, is_expert: bool) -> Tensor:
    """Return float32 [O, I] of upstream's MXFP4 codes [O, I/2], or its FP8 codes [O, I]."""
    exponents = scale.view(torch.uint8)
    if is_expert:
        parts = {"weight_packed": codes.view(torch.uint8), "weight_scale": exponents}
        return _decode(parts, _UPSTREAM_MXFP4)
    return _decode_fp8(codes, torch.exp2(exponents.float() - 127))  # E8M0 by its definition


def _difference(ours: Tensor, expected: Tensor) -> str | None:
    if (ours.dtype, ours.shape) != (expected.dtype, expected.shape):
        return f"is {_said(ours)}, expected {_said(expected)}"
    ours, expected = (t.contiguous().flatten().view(torch.uint8) for t in (ours, expected))
    return None if torch.equal(ours, expected) else "its values differ from what it was made of"


def _wrong_expert(
    values: Tensor,
    exact: Tensor,
    scale: Tensor | None,
    scheme: Scheme | None,
    origin: _Origin,
    found: _Findings,
) -> str | None:
    error = values.float() - exact
    norms = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (error, exact))
    rel_error = next(norms) / next(norms)
    found.rel_error_max = max(found.rel_error_max, rel_error)
    int4 = scheme is not None and scheme["format"] == _INT4
    if rel_error > (INT4_REL_ERROR if int4 else 0):
        return f"relative error {rel_error:.3g}, expected at most {INT4_REL_ERROR if int4 else 0}"
    if origin.variant == "rtn" and scale is not None:
        step = scale.float().repeat_interleave(error.shape[1] // scale.shape[1], dim=1)
        steps = float((error.abs() / step).max())
        return None if steps <= RTN_STEPS else f"is {steps:.2f} steps off, expected {RTN_STEPS}"
    return None


def _compare_base_files(checkpoint: Path, base: Path) -> dict[str, str]:
    """Return how each of the base's files is found in the checkpoint.

    A linked file is one and the same by its inode, which costs nothing; any other is read whole.
    """
    found = {}
    for source in base_files(base):
        name = str(source.relative_to(base))
        target = checkpoint / name
        if not target.exists():
            found[name] = "missing"
        elif os.path.samefile(source, target):
            found[name] = "same inode"
        else:
            same = filecmp.cmp(source, target, shallow=False)
            found[name] = "same bytes" if same else "differs"
    return found
