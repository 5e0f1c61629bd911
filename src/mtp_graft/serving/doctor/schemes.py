"""Checks of quantization_config: every module has to find the scheme that it is stored in."""

import re
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

from mtp_graft.checkpoint.quantization_config import QuantizationConfig, read_quantization
from mtp_graft.dsv4.names import EXPERT, QUANTIZED, served_as
from mtp_graft.errors import GraftError
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.doctor.findings import Finding, Severity, finding, listed
from mtp_graft.serving.doctor.hardware import Target

#: platform -> the names that its builds of vLLM ask for an expert's matrices by.
_EXPERT_NAMES = {
    "cuda": {"w1": "w1", "w2": "w2", "w3": "w3"},
    "cpu": {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
}
#: The head in a pattern, under the name that vLLM never asks for.
_MTP = re.compile(
    r"^(re:\^?(?:\.\*)?)?(?:model\\?\.)?mtp(?:\\?\.0)?(?:\\?\.(?![*+?{])|(?=\.[*+?{]))"
)
_EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)\d+")
_WHERE = "config.json: quantization_config"


def section(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find a section that is absent or that vLLM cannot read, and INT4 groups of another size."""
    quantization, given = checkpoint.quantization, checkpoint.config.get("quantization_config")
    if isinstance(quantization, GraftError):
        if set(checkpoint.formats.values()) & {"int4", "mxfp4", "fp8"} or given is not None:
            found = "absent" if given is None else str(quantization).partition(": ")[2]
            yield finding("quantization-config", _WHERE, found, "compressed-tensors' groups")
        return
    if given and given.get("ignore", []) is None:
        yield finding("ignore-null", f"{_WHERE}.ignore", None, "a list")
    for key, (size, stored) in _sizes(checkpoint, quantization).items():
        kind, where = quantization.kind_of(key), f"{_WHERE}.config_groups.{key}"
        if wrong := stored - {size}:
            expected = f"{', '.join(map(str, sorted(wrong)))}, by the scales' shapes"
            cure = "" if len(stored) == 1 else "a group for the experts of each size"
            yield finding("group-size", f"{where}.weights.group_size", size, expected, cure=cure)
        if (kind != "int4" or size < 0) and target.platform == "cpu":
            expected, cure = "int4 in groups, all that a CPU serves", "serve it on GPUs"
            found = kind + ", a scale a channel" * (size < 0)
            yield finding("quantization-config", where, found, expected, cure=cure)


def _sizes(
    checkpoint: Checkpoint, quantization: QuantizationConfig
) -> dict[str, tuple[int, set[int]]]:
    """Return group's key -> its inputs per scale, and those that its experts are stored with.

    Where there is a scale for all inputs, whatever the group has counts that comes to as many.
    """
    most = max(checkpoint.config[key] for key in ("hidden_size", "moe_intermediate_size"))
    found: dict[str, tuple[int, set[int]]] = {}
    with suppress(GraftError):  # a finding of `schemes`
        for experts, stored in checkpoint.group_sizes.items():
            asked = _vllm_names(first := f"{experts}.experts.0.w1", checkpoint.num_layers)
            key = next(filter(None, map(quantization.group_of, asked.values())), None)
            if key and quantization.kind_of(key) == checkpoint.formats.get(first):
                size = quantization.config_groups[key].weights.inputs_per_scale
                is_same = stored < 0 and size >= most
                found.setdefault(key, (size, set()))[1].add(size if is_same else stored)
    return found


def schemes(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find modules that are stored in another format than their scheme loads, and why."""
    if isinstance(checkpoint.quantization, GraftError):
        return
    wrong: dict[tuple[str, str, str], list[str]] = {}
    unnamed: dict[str, set[str]] = {}
    try:
        right, mismatches = _judge(checkpoint)
    except GraftError as error:
        found = str(error).removeprefix("config.json: ")
        yield finding("pattern-too-wide", _WHERE, found, "both or none, in patterns without loops")
        return
    for place, patterns in _patterns(checkpoint.config["quantization_config"]).items():
        for pattern, changed in zip(patterns, _patterns(right)[place], strict=True):
            if changed != pattern:
                yield finding("pattern-names-mtp", f"{_WHERE}.{place}", pattern, changed)
    for each in mismatches:
        if each.elsewhere is not None:
            unnamed.setdefault(each.platform, set()).add(each.name.split(".")[2])
        else:
            stored = "quantized" if each.by.startswith(".ignore") else each.stored
            wrong.setdefault((stored, each.loads, each.by), []).append(each.name)
    for (stored, loads, by), modules in wrong.items():
        kind = "pattern-too-wide" if by.startswith(".ignore") else "scheme-mismatch"
        found = f"{len(modules)} modules would load as {loads}"
        where, expected = f"{_WHERE}{by}: {listed(modules)}", f"{stored}, as they are stored"
        yield finding(kind, where, found, expected)
    for platform, layers in unnamed.items():
        where = f"{_WHERE}.config_groups: targets of routed experts"
        found = f"none for {', '.join(_EXPERT_NAMES[platform].values())} in {len(layers)} layers"
        severity: Severity = "error" if target.platform in (platform, None) else "warning"
        yield finding("expert-target-names", where, found, "both w1 and gate_proj, ...", severity)


def _patterns(section: dict[str, Any]) -> dict[str, list[str]]:
    groups = section["config_groups"].items()
    targets = {f"config_groups.{key}.targets": group["targets"] for key, group in groups}
    return {"ignore": section.get("ignore") or [], **targets}


class _Mismatch(NamedTuple):
    """A module whose scheme is not that of its tensors."""

    name: str  # vLLM's
    platform: str  # whose builds of vLLM ask by this name
    stored: str
    loads: str
    by: str  # what in the section does it, as a path; "" for nothing that matches
    elsewhere: str | None  # the group that other platforms find under their names of the module


def _judge(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[_Mismatch]]:
    """Return the section, and the modules that would load in another format.

    Where patterns for `mtp.0`, which match nothing in vLLM, matter, they are put right: one mistake
    is one finding. Raises GraftError for a module ignored in part, or experts of two schemes.
    """
    section: dict[str, Any] = checkpoint.config["quantization_config"]
    found, right = [*_mismatches(checkpoint, section)], _with_right_patterns(checkpoint)
    if found and right != section:
        with suppress(GraftError):
            better = [*_mismatches(checkpoint, right)]
            section, found = (right, better) if len(better) < len(found) else (section, found)
    return section, found


def _mismatches(checkpoint: Checkpoint, section: dict[str, Any]) -> Iterator[_Mismatch]:
    """Yield modules that would load in another format; raise GraftError as `_judge` says."""
    quantization = read_quantization({"quantization_config": section})
    group_of, ignored_by = cache(quantization.group_of), cache(quantization.ignored_by)
    schemes = {k: g.model_dump(exclude={"targets"}) for k, g in quantization.config_groups.items()}
    of_layer: dict[tuple[str, str], str | None] = {}
    fine: set[tuple[str, str | None]] = set()  # experts, of which one speaks for all
    for module, stored in checkpoint.formats.items():
        if (alike := (_EXPERT_NUMBER.sub("0", module), stored)) in fine:
            continue
        is_odd = stored is None or (module == "embed" and stored != "plain")  # found elsewhere
        asked = {} if is_odd else _vllm_names(module, checkpoint.num_layers)
        first = {p: _EXPERT_NUMBER.sub("0", name) for p, name in asked.items()}  # speaks for all
        groups = {platform: group_of(name) for platform, name in first.items()}
        loads = {platform: quantization.kind_of(key) for platform, key in groups.items()}
        wrong = [platform for platform in asked if loads[platform] != stored]
        fine |= set() if wrong else {alike}
        for p, key in groups.items():
            if p in wrong:
                by = f".config_groups.{key}" if key else ""
                if ignored := ignored_by(first[p]):
                    by = f".ignore: {ignored}"
                named = next(filter(None, groups.values()), None)
                elsewhere = named if len(wrong) == 1 and not by else None
                yield _Mismatch(asked[p], p, str(stored), loads[p], by, elsewhere)
            elif p in _EXPERT_NAMES:
                other = of_layer.setdefault((p, first[p].rpartition(".")[0]), key)
                if schemes.get(str(other)) != schemes.get(str(key)):
                    raise GraftError(f"{module}: finds {key} and other matrices {other}")


def _vllm_names(module: str, num_layers: int) -> dict[str, str]:
    """Return platform -> vLLM's name for a module that it builds as the config says."""
    if module == "embed":
        return {"any": "model.embed_tokens"}
    if not QUANTIZED.match(module):
        return {}
    name = served_as(module, num_layers) if module.startswith("mtp.") else f"model.{module}"
    if not EXPERT.match(module):
        return {"any": name}
    expert, _, matrix = name.rpartition(".")
    return {p: f"{expert}.{names[matrix]}" for p, names in _EXPERT_NAMES.items()}


def _with_right_patterns(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the section with the head's layer, as vLLM names it, for `mtp.0`."""
    section: dict[str, Any] = deepcopy(checkpoint.config["quantization_config"])
    number = checkpoint.num_layers
    regex, name = rf"re:.*layers\.{number}\.", f"model.layers.{number}."
    for patterns in _patterns(section).values():
        patterns[:] = [_MTP.sub(lambda found: regex if found[1] else name, p) for p in patterns]
    return section


def corrected(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the section with all that --fix cures."""
    quantization = checkpoint.quantization
    assert isinstance(quantization, QuantizationConfig)
    judged, mismatches = _judge(checkpoint)
    section = deepcopy(judged) | {"ignore": judged.get("ignore") or []}
    groups = section["config_groups"]
    for key, (size, stored) in _sizes(checkpoint, quantization).items():
        if len(stored) == 1 and stored != {size}:
            by = "channel" if stored == {-1} else "group"
            groups[key]["weights"] |= {"group_size": min(stored), "strategy": by}
    for each in mismatches:
        if each.elsewhere is not None:
            matrices = "|".join(_EXPERT_NAMES[each.platform].values())
            layer = each.name.split(".")[2]
            target = rf"re:.*layers\.{layer}\.ffn\.experts\.\d+\.({matrices})$"
            targets = groups[each.elsewhere]["targets"]
            groups[each.elsewhere]["targets"] = list(dict.fromkeys([*targets, target]))
    return section
