"""Verify: read a spliced checkpoint back with other code than what wrote it, and compare.

Engines skip tensors whose name they do not know, and then draft noise. Here every tensor of the
head is derived from upstream's names, read with plain safetensors, decompressed by
compressed-tensors under the checkpoint's own config, and compared with upstream's values.
"""

import filecmp
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.utils.match import match_name
from torch import Tensor

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.shards import INDEX_NAME, open_shard, read_index
from mtp_graft.errors import GraftError, in_words
from mtp_graft.stages.quantize import GPTQ

#: Largest relative error (Frobenius) that an INT4 matrix may have: nearest rounding in groups of
#: 128 gives about 0.11, GPTQ more. A swapped or doubled matrix has 1 or more.
INT4_REL_ERROR = 0.35
#: Nearest rounding misses by half a step; a little more at the end codes, whose scale is rounded.
RTN_STEPS = 0.54

_EXPERT = re.compile(r"^mtp\.0\.ffn\.experts\.(\d+)\.w[123]$")
_EXPERTS = "mtp.0.ffn.experts."
_NOT_LINKED = frozenset(
    {
        INDEX_NAME,
        "config.json",
        quant_manifest.MANIFEST_NAME,
        quant_manifest.MANIFEST_TEXT_NAME,
        quant_manifest.RECIPE_NAME,
    }
)


@dataclass
class _Findings:
    """What has been found wrong so far, and the largest error of what was right."""

    missing: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    mismatched: dict[str, str] = field(default_factory=dict)  # name -> why
    checked: int = 0
    rel_error_max: float = 0.0


class _Folder:
    """A checkpoint's tensors by name: those that index and shard both have."""

    def __init__(self, weight_map: Mapping[str, str], folder: Path, stack: ExitStack) -> None:
        paths = {shard: folder / shard for shard in sorted(set(weight_map.values()))}
        self._open = {s: stack.enter_context(open_shard(path)) for s, path in paths.items()}
        held = {(s, name) for s, file in self._open.items() for name in file.keys()}  # noqa: SIM118
        self.listed_only = {name for name, s in weight_map.items() if (s, name) not in held}
        self.held_only = {name for s, name in held if weight_map.get(name) != s}
        self._shards = {n: s for n, s in weight_map.items() if n not in self.listed_only}

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor: Tensor = self._open[self._shards[name]].get_tensor(name)
        return tensor


def verify(
    checkpoint: Path, base: Path, upstream: Path, quantized: Path | None = None
) -> dict[str, Any]:
    """Account for every tensor of a spliced checkpoint; return what was found.

    FP8, BF16 and F32 tensors must equal upstream's bit for bit, scales as numbers; kept and
    decoded experts must have no error at all, nearest rounding half a step at the most, and GPTQ's
    experts the bytes in `quantized` (if given) and an error below `INT4_REL_ERROR`. The keys are
    `ok`, `tensors`, `missing`, `unexpected`, `mismatched` ([{tensor, why}]), `rel_error_max` (over
    expert matrices, Frobenius), `base_files` (name -> `same inode`, `same bytes`, `differs` or
    `missing`), `base_files_linked`, `base_unchanged`, and `loaded_in_vllm`, None: that is seen when
    the checkpoint is served. Raises GraftError for files that cannot be read.
    """
    manifest = _read_json(checkpoint / quant_manifest.MANIFEST_NAME)
    found = _Findings()
    with ExitStack() as stack:
        stored = _Folder(read_index(checkpoint), checkpoint, stack)
        theirs = _Folder(read_index(upstream, "mtp.0."), upstream, stack)
        _check_names(stored, read_index(base), theirs, found)
        given = _gptq_experts(manifest, quantized, stack)
        _check_head(stored, theirs, _Schemes(checkpoint), manifest, given, found)
    files = _compare_base_files(checkpoint, base)
    unchanged = "differs" not in files.values() and "missing" not in files.values()
    unchanged = unchanged and _is_the_base(base, manifest)
    return {
        "ok": not (found.missing or found.unexpected or found.mismatched) and unchanged,
        "variant": manifest.get("variant"),
        "tensors": found.checked,
        "missing": sorted(found.missing),
        "unexpected": sorted(found.unexpected),
        "mismatched": [{"tensor": n, "why": w} for n, w in sorted(found.mismatched.items())],
        "rel_error_max": found.rel_error_max,
        "base_files": files,
        "base_files_linked": set(files.values()) <= {"same inode"},
        "base_unchanged": unchanged,
        "loaded_in_vllm": None,
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise GraftError(
            f"{path}: not readable ({in_words(error)}); expected a spliced checkpoint"
        ) from error
    return content


# Names


def _check_names(
    stored: _Folder, base_map: Mapping[str, str], theirs: _Folder, found: _Findings
) -> None:
    """Compare index and shards with each other, and with the base's index."""
    found.missing |= stored.listed_only | theirs.listed_only
    found.missing |= {name for name in base_map if name not in stored}
    # What a shard holds and the index does not list: no engine will read it.
    found.unexpected |= stored.held_only
    others = {name for name in stored if not name.startswith("mtp.0.")}
    found.unexpected |= others - base_map.keys()


class _Schemes:
    """What the checkpoint's own config says of the head's modules, by vLLM's names for them."""

    def __init__(self, checkpoint: Path) -> None:
        config = _read_json(checkpoint / "config.json")
        quantization = config["quantization_config"]
        self._layer = f"model.layers.{config['num_hidden_layers']}."
        self._ignore: list[str] = quantization.get("ignore", [])
        self._groups: list[dict[str, Any]] = list(quantization["config_groups"].values())

    def of(self, stem: str) -> dict[str, Any] | None:
        """Return the config group that covers `mtp.0.ffn.experts.0.w1`, say; None if none does."""
        module = self._layer + stem.removeprefix("mtp.0.")
        if any(match_name(module, pattern) for pattern in self._ignore):
            return None
        return next(
            (g for g in self._groups if any(match_name(module, t) for t in g["targets"])), None
        )


def _gptq_experts(
    manifest: Mapping[str, Any], quantized: Path | None, stack: ExitStack
) -> _Folder | None:
    """Open what the quantize stage wrote, for a checkpoint that should carry just that."""
    if quantized is None or manifest.get("variant") != "gptq":
        return None
    folder = quantized / GPTQ
    files = {}
    for path in sorted(folder.glob("experts-*.safetensors")):
        with open_shard(path) as tensors:
            files.update(dict.fromkeys(tensors.keys(), path.name))
    if not files:
        raise GraftError(f"{folder}: has no experts-*.safetensors; expected GPTQ's experts")
    return _Folder(files, folder, stack)


# The head's values


def _check_head(
    stored: _Folder,
    theirs: _Folder,
    schemes: _Schemes,
    manifest: Mapping[str, Any],
    given: _Folder | None,
    found: _Findings,
) -> None:
    """Derive every stored tensor from upstream's names, and compare it."""
    accounted: set[str] = set()
    for name in theirs:
        if name.endswith(".scale"):
            continue  # goes with its weight
        stem = name.removesuffix(".weight")
        if f"{stem}.scale" not in theirs:
            wanted = {"": name}
        elif _EXPERT.match(stem):
            scheme = schemes.of(f"{_EXPERTS}0.w1")  # one for all of them
            wanted = {part: f"{stem}.{part}" for part in _expert_parts(scheme)}
        else:
            parts_of_linear = ("weight", "weight_scale") if schemes.of(stem) else ("weight",)
            wanted = {part: f"{stem}.{part}" for part in parts_of_linear}
        accounted |= set(wanted.values())
        if absent := {each for each in wanted.values() if each not in stored}:
            found.missing |= absent
            continue
        parts = {part: stored.get(each) for part, each in wanted.items()}
        found.checked += len(parts)
        if _EXPERT.match(stem):
            why = _compare_expert(stem, parts, theirs, scheme, manifest, given, found)
        else:
            why = _compare(stem, parts, theirs)
        if why:
            found.mismatched[wanted.get("weight", next(iter(wanted.values())))] = why
    found.unexpected |= {n for n in stored if n.startswith("mtp.0.")} - accounted


def _compare(stem: str, parts: Mapping[str, Tensor], theirs: _Folder) -> str | None:
    """Return how a tensor outside of the routed experts differs from upstream's, or None."""
    if "" in parts:
        name = stem if stem in theirs else f"{stem}.weight"
        return _difference(parts[""], theirs.get(name))
    codes, scale = theirs.get(f"{stem}.weight"), theirs.get(f"{stem}.scale")
    numbers = torch.exp2(scale.view(torch.uint8).float() - 127)  # E8M0 by its definition
    if "weight_scale" not in parts:  # decoded
        return _difference(parts["weight"], _decode_fp8(codes, numbers).to(torch.bfloat16))
    why = _difference(parts["weight"], codes)
    if why:
        return f"codes: {why}"
    why = _difference(parts["weight_scale"], numbers.to(torch.bfloat16))
    return why and f"weight_scale: {why}"


def _difference(ours: Tensor, expected: Tensor) -> str | None:
    if ours.dtype != expected.dtype:
        return f"is {ours.dtype}, expected {expected.dtype}"
    if ours.shape != expected.shape:
        return f"is {list(ours.shape)}, expected {list(expected.shape)}"
    ours, expected = (t.contiguous().flatten().view(torch.uint8) for t in (ours, expected))
    return None if torch.equal(ours, expected) else "its values differ from upstream's"


def _decode_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """Return float32 [O, I]; the row and the column of a weight, over 128, are its scale's."""
    rows = torch.arange(codes.shape[0]) // 128
    columns = torch.arange(codes.shape[1]) // 128
    return codes.float() * scale[rows[:, None], columns]


# The routed experts


def _expert_parts(scheme: dict[str, Any] | None) -> tuple[str, ...]:
    if scheme is None:
        return ("weight",)
    if scheme["weights"]["type"] == "int":
        return ("weight_packed", "weight_scale", "weight_shape")
    return ("weight_packed", "weight_scale")


def _compare_expert(
    stem: str,
    parts: Mapping[str, Tensor],
    theirs: _Folder,
    scheme: dict[str, Any] | None,
    manifest: Mapping[str, Any],
    given: _Folder | None,
    found: _Findings,
) -> str | None:
    """Return what is wrong with one expert matrix, or None; note its relative error."""
    exact = _decode_mxfp4(theirs.get(f"{stem}.weight"), theirs.get(f"{stem}.scale"))
    if why := _expert_layout(parts, scheme, list(exact.shape)):
        return why
    error = _decompress(parts, scheme).float() - exact
    rel_error = _norm(error) / _norm(exact)
    found.rel_error_max = max(found.rel_error_max, rel_error)
    int4 = scheme is not None and scheme["weights"]["type"] == "int"
    bound = INT4_REL_ERROR if int4 else 0.0
    if not rel_error <= bound:  # NaN too
        return f"relative error {rel_error:.3g}, expected at most {bound}"
    if manifest.get("variant") == "rtn":
        step = parts["weight_scale"].float().repeat_interleave(_group_size(scheme), dim=1)
        steps = float((error.abs() / step).max())
        return None if steps <= RTN_STEPS else f"is {steps:.2f} steps off, expected {RTN_STEPS}"
    if given is None:
        return None
    for part, ours in parts.items():
        name = f"{stem}.{part}"
        if name not in given:
            return f"{part}: not among the quantized experts"
        if why := _difference(ours, given.get(name)):
            return f"{part}: {why} (compared with the quantize stage's)"
    return None


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _expert_layout(
    parts: Mapping[str, Tensor], scheme: dict[str, Any] | None, shape: list[int]
) -> str | None:
    """Return which part of an expert matrix has another dtype or shape than its format says."""
    outputs, inputs = shape
    expected: dict[str, tuple[torch.dtype, list[int]]]
    if scheme is None:
        expected = {"weight": (torch.bfloat16, shape)}
    elif scheme["weights"]["type"] == "int":
        expected = {
            "weight_packed": (torch.int32, [outputs, inputs // 8]),
            "weight_scale": (torch.bfloat16, [outputs, inputs // _group_size(scheme)]),
            "weight_shape": (torch.int64, [2]),
        }
    else:
        expected = {
            "weight_packed": (torch.uint8, [outputs, inputs // 2]),
            "weight_scale": (torch.uint8, [outputs, inputs // _group_size(scheme)]),
        }
    for part, (dtype, size) in expected.items():
        if (parts[part].dtype, list(parts[part].shape)) != (dtype, size):
            found = f"{list(parts[part].shape)} {parts[part].dtype}"
            return f"{part} is {found}, expected {size} {dtype}"
    if "weight_shape" in parts and parts["weight_shape"].tolist() != shape:
        return f"weight_shape is {parts['weight_shape'].tolist()}, expected {shape}"
    return None


def _group_size(scheme: dict[str, Any] | None) -> int:
    assert scheme is not None, "an unquantized expert has no groups"
    size: int = scheme["weights"]["group_size"]
    return size


def _decompress(parts: Mapping[str, Tensor], scheme: dict[str, Any] | None) -> Tensor:
    """Return [O, I] as compressed-tensors reads it."""
    if scheme is None:
        return parts["weight"]
    weights = QuantizationArgs.model_validate(scheme["weights"])
    theirs = QuantizationScheme(targets=scheme["targets"], weights=weights)
    given = dict(parts)
    if scheme["weights"]["type"] != "int":
        decompressed: Tensor = MXFP4PackedCompressor.decompress(given, theirs)["weight"]
        return decompressed
    # It multiplies in the scale's dtype; float32 keeps its rounding out of the comparison.
    given["weight_scale"] = given["weight_scale"].float()
    decompressed = PackedQuantizationCompressor.decompress(given, theirs)["weight"]
    return decompressed


def _decode_mxfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """Return float32 [O, I] of upstream's codes [O, I/2] and scales [O, I/32]."""
    outputs, inputs = codes.shape[0], 2 * codes.shape[1]
    packed = codes.view(torch.uint8)
    values = unpack_fp4_from_uint8(packed, outputs, inputs, dtype=torch.float32)
    numbers = torch.exp2(scale.view(torch.uint8).float() - 127)  # [O, I/32]
    return (values.view(outputs, -1, 32) * numbers.unsqueeze(-1)).view(outputs, inputs)


# The base


def _compare_base_files(checkpoint: Path, base: Path) -> dict[str, str]:
    """Return how each of the base's files is found in the checkpoint.

    A linked file is one and the same by its inode, which costs nothing; any other is read whole.
    """
    found = {}
    for source in sorted(path for path in base.rglob("*") if path.is_file()):
        relative = source.relative_to(base)
        name = str(relative)
        if name in _NOT_LINKED or any(part.startswith(".") for part in relative.parts[:-1]):
            continue
        target = checkpoint / relative
        if not target.exists():
            found[name] = "missing"
        elif os.path.samefile(source, target):
            found[name] = "same inode"
        else:
            same = filecmp.cmp(source, target, shallow=False)
            found[name] = "same bytes" if same else "differs"
    return found


def _is_the_base(base: Path, manifest: Mapping[str, Any]) -> bool:
    """Return whether index, config and shard headers are those that the manifest recorded."""
    recorded = manifest.get("provenance", {}).get("base")
    shards = sorted(set(read_index(base).values()))
    return bool(recorded == quant_manifest.base_provenance(base, shards))
