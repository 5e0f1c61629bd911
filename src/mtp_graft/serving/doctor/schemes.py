"""Checks of quantization_config: every module has to find the scheme that it is stored in."""

import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

from mtp_graft.checkpoint.quantization_config import INTEGERS, QuantizationConfig, read_quantization
from mtp_graft.dsv4.names import EXPERT, NEVER_QUANTIZED, PLAIN, served_as
from mtp_graft.dsv4.variants import Parts, format_of, weight_of
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
_MTP = re.compile(r"^(re:\^?(?:\.\*)?)?(?:model\\?\.)?mtp(?:\\?\.0)?\\?\.")
_WHERE = "config.json: quantization_config"


def section(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find a section that is absent or that vLLM cannot read, and INT4 groups of another size."""
    quantization, given = checkpoint.quantization, checkpoint.config.get("quantization_config")
    if isinstance(quantization, GraftError):
        if set(checkpoint.formats.values()) & {"int4", "mxfp4", "fp8"} or given is not None:
            found = "absent" if given is None else str(quantization).partition(": ")[2]
            yield finding("quantization-config", _WHERE, found, "compressed-tensors' groups")
        return
    if given is not None and given.get("ignore", []) is None:
        yield finding("ignore-null", f"{_WHERE}.ignore", None, "a list")
    for key, group in quantization.config_groups.items():
        where, is_there = f"{_WHERE}.config_groups.{key}", group.kind in checkpoint.formats.values()
        if not is_there or group.kind not in INTEGERS:
            continue
        size, stored = group.weights.group_size, checkpoint.group_size
        if size != stored:
            expected = f"{stored}, by the scales' shapes"
            yield finding("group-size", f"{where}.weights.group_size", size, expected)
        if (group.kind != "int4" or stored < 0) and target.platform == "cpu":
            expected, cure = "int4 in groups, all that a CPU serves", "serve it on GPUs"
            found = group.kind + (", a scale a channel" if stored < 0 else "")
            yield finding("quantization-config", where, found, expected, cure=cure)


def patterns(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find patterns written for `mtp.0`, a name that vLLM never asks for."""
    if isinstance(quantization := checkpoint.quantization, GraftError):
        return
    lists = {f"config_groups.{k}.targets": g.targets for k, g in quantization.config_groups.items()}
    for place, listed_there in {"ignore": quantization.ignore, **lists}.items():
        for pattern in listed_there:
            right = _for_vllm(pattern, checkpoint.num_layers)
            if right != pattern:
                yield finding("pattern-names-mtp", f"{_WHERE}.{place}", pattern, right)


def _for_vllm(pattern: str, num_layers: int) -> str:
    """Return a pattern for `mtp.0` as one for the head's layer in vLLM, others as they are."""
    regex, name = rf"re:.*layers\.{num_layers}\.", f"model.layers.{num_layers}."
    return _MTP.sub(lambda match: regex if match[1] else name, pattern)


def schemes(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find modules that are stored in another format than their scheme loads."""
    wrong: dict[tuple[str, str, str], list[str]] = {}
    unnamed: dict[str, set[str]] = {}
    try:
        for each in _mismatches(checkpoint):
            if each.elsewhere is not None:
                unnamed.setdefault(each.platform, set()).add(each.layer)
            else:
                stored = "quantized" if each.by.startswith(".ignore") else each.stored
                wrong.setdefault((stored, each.loads, each.by), []).append(each.name)
    except GraftError as error:
        yield finding("pattern-too-wide", _WHERE, error, "both or none, in patterns without loops")
        return
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


class _Mismatch(NamedTuple):
    """A module whose scheme is not that of its tensors."""

    name: str  # vLLM's
    platform: str  # whose builds of vLLM ask by this name
    stored: str
    loads: str
    by: str  # what in the section does it, as a path; "" for nothing that matches
    elsewhere: str | None  # the group that other platforms find under their names of the module

    @property
    def layer(self) -> str:
        return self.name.split(".")[2]


def _mismatches(checkpoint: Checkpoint) -> Iterator[_Mismatch]:
    """Yield modules that would load in another format; GraftError for one ignored in part.

    Patterns for `mtp.0` are put right first: one mistake is one finding.
    """
    if isinstance(checkpoint.quantization, GraftError):
        return
    quantization = read_quantization({"quantization_config": _with_right_patterns(checkpoint)})
    for module, stored in checkpoint.formats.items():
        asked = _vllm_names(module, checkpoint.modules[module], checkpoint.num_layers)
        groups = {platform: quantization.group_of(name) for platform, name in asked.items()}
        loads = {platform: quantization.kind_of(key) for platform, key in groups.items()}
        wrong = [platform for platform in asked if loads[platform] != stored]
        for p in wrong:
            by = f".config_groups.{groups[p]}" if groups[p] else ""
            if ignored := quantization.ignored_by(asked[p]):
                by = f".ignore: {ignored}"
            named = next(filter(None, groups.values()), None)
            elsewhere = named if len(wrong) == 1 and not by else None
            yield _Mismatch(asked[p], p, str(stored), loads[p], by, elsewhere)


def _vllm_names(module: str, parts: Parts, num_layers: int) -> dict[str, str]:
    """Return platform -> vLLM's name for a module that could be quantized; of experts the first."""
    name = served_as(module, num_layers) if module.startswith("mtp.") else f"model.{module}"
    weight = weight_of(parts)
    is_matrix = "" not in parts and weight is not None and weight.dim() == 2
    if format_of(parts) is None or not is_matrix or not module.startswith(("layers.", "mtp.")):
        return {}
    if NEVER_QUANTIZED.search(name) or PLAIN.search(module):
        return {}
    if not EXPERT.match(module):
        return {"any": name}
    experts, _, matrix = name.rpartition(".")
    if not experts.endswith(".ffn.experts.0"):
        return {}
    return {p: f"{experts}.{names[matrix]}" for p, names in _EXPERT_NAMES.items()}


def _with_right_patterns(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the section with a list where it may have null, and the head's layer for `mtp.0`."""
    section: dict[str, Any] = deepcopy(checkpoint.config["quantization_config"])
    groups = [(group, "targets") for group in section["config_groups"].values()]
    for holder, key in [(section, "ignore"), *groups]:
        holder[key] = [_for_vllm(each, checkpoint.num_layers) for each in holder.get(key) or []]
    return section


def corrected(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the section with all that --fix cures."""
    section, quantization = _with_right_patterns(checkpoint), checkpoint.quantization
    groups = section["config_groups"]
    assert isinstance(quantization, QuantizationConfig)
    for key, group in quantization.config_groups.items():
        if group.kind in INTEGERS:
            groups[key]["weights"]["group_size"] = checkpoint.group_size
    for each in _mismatches(checkpoint):
        if each.elsewhere is not None:
            matrices = "|".join(_EXPERT_NAMES[each.platform].values())
            target = rf"re:.*layers\.{each.layer}\.ffn\.experts\.\d+\.({matrices})$"
            targets = groups[each.elsewhere]["targets"]
            groups[each.elsewhere]["targets"] = list(dict.fromkeys([*targets, target]))
    return section
