"""Checks of the tensors: names, shapes and dtypes against what the config asks for."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mtp_graft.dsv4.head_shapes import head_shapes
from mtp_graft.dsv4.names import FLOAT32, NEVER_QUANTIZED
from mtp_graft.dsv4.variants import decoded_name, is_expert, split_name
from mtp_graft.serving.doctor.expected import base_shapes
from mtp_graft.serving.doctor.findings import Finding, listed
from mtp_graft.serving.doctor.formats import (
    NEEDED,
    format_of,
    logical_shape,
    scale_dtypes,
    scale_shape,
)
from mtp_graft.serving.doctor.survey import Survey
from mtp_graft.serving.doctor.target import Target

_COMPRESSION = re.compile(r"\.attn\.(compressor|indexer)\.")
_OTHER_BLOCK = re.compile(r"^mtp\.[1-9]\d*\.")
_UNQUANTIZED_LOAD = (
    "stock vLLM loads a quantized checkpoint without counting: a parameter that no tensor fills "
    "keeps what was in memory, and the head drafts worse, down to nothing, without a word"
)


def dspark_drafter(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find the three-block drafter of newer upstream checkpoints."""
    blocks = sorted({name.split(".")[1] for name in survey.tensors if _OTHER_BLOCK.match(name)})
    if blocks:
        yield Finding(
            "dspark-drafter",
            "error",
            "mtp." + ", mtp.".join(blocks),
            f"{len(blocks)} blocks besides mtp.0",
            "mtp.0 alone, as in DeepSeek-V4-Flash's first release",
            "these are blocks of a DSpark drafter, another architecture: with method `mtp` vLLM "
            "builds as many blocks as num_nextn_predict_layers says and passes over the others",
            "serve it with vLLM's method `dspark`, which this project does not support, or take "
            "the head of an upstream checkpoint that has one block",
        )


def wrong_names(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find tensors under another spelling of their name."""
    scales = {old: new for old, new in survey.renamed.items() if _is_scale_rename(old, new)}
    others = {old: new for old, new in survey.renamed.items() if old not in scales}
    if scales:
        old, new = next(iter(scales.items()))
        yield Finding(
            "scale-name",
            "error",
            listed(scales),
            f"{len(scales)} scales such as {old}",
            f"{new}, and the others alike",
            "a compressed-tensors layer calls its scale `weight_scale`; stock vLLM stops with a "
            "KeyError at another name, after minutes of loading",
            "--fix renames them",
            fixable=True,
        )
    if others:
        old, new = next(iter(others.items()))
        yield Finding(
            "tensor-name",
            "error",
            listed(others),
            f"{len(others)} tensors such as {old}",
            f"{new}, and the others alike",
            "vLLM's loader has no rule for the name. It passes over an expert's tensor without a "
            "word, and the head drafts worse, down to nothing; for other modules it stops with a "
            "KeyError",
            "--fix renames them",
            fixable=True,
        )


def _is_scale_rename(old: str, new: str) -> bool:
    return old.rpartition(".")[0] == new.rpartition(".")[0] and new.endswith(".weight_scale")


def missing_tensors(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find tensors that the config asks for, whole or in part, and that are nowhere."""
    present = survey.tensors.keys() | survey.unknown_state
    stems = {decoded_name(stem, parts) for stem, parts in survey.stems.items()}
    for name in survey.unknown_state:
        stem, part = split_name(name)
        stems.add(decoded_name(stem, (part,)))
    for place, shapes in _expected(survey).items():
        lost = [name for name in shapes if name not in stems]
        for stem, parts in survey.stems.items():
            if decoded_name(stem, parts) in shapes:
                needed = _needed_parts(stem, parts)
                lost += [f"{stem}.{part}" for part in needed if f"{stem}.{part}" not in present]
        if lost:
            yield Finding(
                f"{place}-tensor-missing",
                "error",
                listed(lost),
                f"{len(lost)} tensors are in no shard",
                f"all that config.json asks of the {place}",
                _UNQUANTIZED_LOAD + ". The plugin stops when it is loaded, and names them",
                "splice the head again" if place == "head" else "fetch the base again",
            )


def _needed_parts(stem: str, parts: Mapping[str, Any]) -> tuple[str, ...]:
    stored = format_of(parts)
    if stored is not None:
        return NEEDED[stored]
    if any(part in parts for part in ("weight", "weight_packed", "")):
        return ()  # of a dtype that no format has: a finding of its own
    return ("weight_packed",) if is_expert(stem) else ("weight",)


def unknown_tensors(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find tensors that no module takes."""
    known = {name for shapes in _expected(survey, always=True).values() for name in shapes}
    cannot_say = _COMPRESSION if len(survey.ratios) < survey.num_layers else _OTHER_BLOCK
    unknown: dict[str, list[str]] = {"head": [], "base": []}
    for stem, parts in survey.stems.items():
        place = "head" if stem.startswith("mtp.") else "base"
        has_own_finding = _OTHER_BLOCK.match(stem) or cannot_say.search(stem)
        if decoded_name(stem, parts) not in known and not has_own_finding:
            unknown[place] += [f"{stem}.{part}" if part else stem for part in parts]
    for place, names in unknown.items():
        if names:
            yield Finding(
                f"{place}-tensor-unknown",
                "error",
                listed(names),
                f"{len(names)} tensors that no module of the {place} has",
                "only what config.json asks for",
                "vLLM passes over an expert's tensor that it does not know and stops with a "
                "KeyError at any other; what should have been there stays unfilled",
                "find out what it was meant to be; splice the head again, or fetch the base",
            )


def wrong_shapes(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find matrices and parameters whose shape is not the config's."""
    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for shapes in _expected(survey, always=True).values():
        for stem, parts in survey.stems.items():
            name, stored = decoded_name(stem, parts), format_of(parts)
            if name in shapes and stored is not None:
                found = logical_shape(stored, parts)
                if found != shapes[name]:
                    wrong[name] = (found, shapes[name])
    if wrong:
        (found, expected) = next(iter(wrong.values()))
        yield Finding(
            "tensor-shape",
            "error",
            listed(wrong),
            f"{list(found)} ({len(wrong)} tensors in all)",
            f"{list(expected)} by config.json",
            "vLLM stops in the middle of loading with an assertion that names neither the tensor "
            "nor the file",
            "head and base are of different models, or config.json is: take all from one release",
        )


def wrong_scales(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find scales that do not fit their matrix."""
    group_size = survey.group_size
    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for stem, parts in survey.stems.items():
        stored = format_of(parts)
        if stored in (None, "plain") or "weight_scale" not in parts:
            continue
        assert stored is not None
        found = tuple(parts["weight_scale"].shape)
        expected = scale_shape(stored, logical_shape(stored, parts), group_size)
        if found != expected:
            wrong[f"{stem}.weight_scale"] = (found, expected)
    if wrong:
        found, expected = next(iter(wrong.values()))
        yield Finding(
            "scale-shape",
            "error",
            listed(wrong),
            f"{list(found)} ({len(wrong)} scales in all)",
            f"{list(expected)}, one a group of {group_size} inputs or a block of 128 x 128",
            "vLLM stops with an assertion while it loads; where the sizes happen to divide, it "
            "reads scales of other groups",
            "quantize and splice again; in the base, fetch the shard again",
        )


def wrong_dtypes(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find weights of a dtype that no format has, and scales of another format's."""
    wrong: dict[str, torch.dtype] = {}
    for stem, parts in survey.stems.items():
        stored = format_of(parts)
        scale = parts.get("weight_scale")
        if stored is None:
            for part in ("weight", "weight_packed", ""):
                if part in parts:
                    wrong[f"{stem}.{part}" if part else stem] = parts[part].dtype
        elif stored != "plain" and scale is not None and scale.dtype not in scale_dtypes(stored):
            wrong[f"{stem}.weight_scale"] = scale.dtype
    if wrong:
        yield Finding(
            "tensor-dtype",
            "error",
            listed(wrong),
            f"{next(iter(wrong.values()))} ({len(wrong)} tensors in all)",
            "int32 codes with BF16 scales, uint8 MXFP4 codes with uint8 scales, FP8 E4M3 with "
            "BF16 or F32 scales, or an unquantized weight",
            "vLLM copies the values into a parameter of its own dtype: upstream's MXFP4 bytes, for "
            "instance, become numbers of no meaning, and the head drafts worse, down to nothing",
            "splice the head with mtp-graft, which converts upstream's formats",
        )


def rounded_float32(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find parameters that have to stay in float32 and were rounded."""
    rounded = [
        name
        for name, tensor in survey.tensors.items()
        if FLOAT32.search(name) and tensor.dtype in (torch.bfloat16, torch.float16)
    ]
    if rounded:
        yield Finding(
            "float32-rounded",
            "warning",
            listed(rounded),
            f"{len(rounded)} parameters in {survey.tensors[rounded[0]].dtype}",
            "float32",
            "vLLM loads them without a word: router biases and hyper-connections have lost bits, "
            "so experts are chosen and streams mixed a little otherwise than trained",
            "take them from upstream; `save_pretrained` of a BF16 model rounds them",
        )


def quantized_compressors(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find compressor or indexer weights that are quantized: FP8 blocks are decoded at load."""
    found = {
        stem: format_of(parts)
        for stem, parts in survey.stems.items()
        if NEVER_QUANTIZED.search(stem) and (format_of(parts) != "plain" or "weight_scale" in parts)
    }
    decoded = [stem for stem, stored in found.items() if stored == "fp8"]
    others = [stem for stem in found if stem not in decoded]
    expected = "BF16: vLLM builds compressors and the indexer's weights_proj without quantization"
    stops = "stock vLLM stops with a KeyError at the first `compressor...weight_scale`"
    if decoded:
        yield Finding(
            "compressor-fp8",
            "note",
            listed(decoded),
            f"{len(decoded)} weights in FP8 blocks",
            expected,
            f"{stops}; the plugin decodes them to BF16 while it loads",
            "nothing with `mtp-graft serve`; without the plugin, decode them in the base",
        )
    if others:
        yield Finding(
            "compressor-quantized",
            "error",
            listed(others),
            f"{len(others)} quantized weights that are not FP8 in blocks",
            expected,
            f"{stops} or `weight_packed`; the plugin decodes FP8 in blocks alone",
            "decode them to BF16 in the base, or take them from upstream",
        )


def _expected(survey: Survey, *, always: bool = False) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the expected names and shapes of head and base; of a head only if there is one."""
    shapes = {"base": base_shapes(survey.config)}
    if always or survey.has_head:
        shapes["head"] = head_shapes(survey.config)
    return shapes
