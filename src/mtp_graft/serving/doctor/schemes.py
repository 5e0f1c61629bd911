"""Checks of quantization_config: every module has to find the scheme that it is stored in."""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from mtp_graft.checkpoint.quantization_config import QuantizationConfig, read_quantization
from mtp_graft.dsv4.names import NEVER_QUANTIZED
from mtp_graft.dsv4.variants import is_expert
from mtp_graft.errors import GraftError
from mtp_graft.serving.doctor.checkpoint import Checkpoint, Module
from mtp_graft.serving.doctor.findings import Finding, Severity, finding, listed
from mtp_graft.serving.doctor.target import Target

#: platform -> the names that its builds of vLLM ask for an expert's matrices by.
_EXPERT_NAMES = {
    "cuda": {"w1": "w1", "w2": "w2", "w3": "w3"},
    "cpu": {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
}
_MTP = re.compile(r"^(re:\^?(?:\.\*)?)?(?:model\\?\.)?mtp(?:\\?\.0)?\\?\.")


def section(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find a section that is absent or that vLLM cannot read, and INT4 groups of another size."""
    where, quantization = "config.json: quantization_config", checkpoint.quantization
    given = checkpoint.config.get("quantization_config")
    if isinstance(quantization, GraftError):
        if checkpoint.formats & {"int4", "mxfp4", "fp8"} or given is not None:
            found = "absent" if given is None else str(quantization).partition(": ")[2]
            yield finding("quantization-config", where, found, "compressed-tensors' groups")
        return
    assert isinstance(given, dict)
    if given.get("ignore", []) is None:
        yield finding("ignore-null", f"{where}.ignore", None, "a list")
    for key, group in quantization.config_groups.items():
        size = group.weights and group.weights.group_size
        if group.kind == "int4" in checkpoint.formats and size != checkpoint.group_size:
            place, expected = (
                f"{where}.config_groups.{key}.weights.group_size",
                checkpoint.group_size,
            )
            yield finding("group-size", place, size, f"{expected}, by the shapes of the scales")


def patterns(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find patterns written for `mtp.0`, a name that vLLM never asks for."""
    quantization = checkpoint.quantization
    if isinstance(quantization, QuantizationConfig):
        lists = {
            f"config_groups.{k}.targets": g.targets for k, g in quantization.config_groups.items()
        }
        for place, written in ({"ignore": quantization.ignore} | lists).items():
            for pattern in written:
                right = _for_vllm(pattern, checkpoint.num_layers)
                if right != pattern:
                    yield finding(
                        "pattern-names-mtp", f"quantization_config.{place}", pattern, right
                    )


def _for_vllm(pattern: str, num_layers: int) -> str:
    """Return a pattern for `mtp.0` as one for the head's layer in vLLM, others as they are."""

    def named(match: re.Match[str]) -> str:
        return rf"re:.*layers\.{num_layers}\." if match[1] else f"model.layers.{num_layers}."

    return _MTP.sub(named, pattern)


def schemes(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find modules that are stored in another format than their scheme loads."""
    try:
        wrong, unnamed = _compare(checkpoint)
    except GraftError as error:
        yield finding("pattern-too-wide", "quantization_config.ignore", error, "both or none")
        return
    for (stored, loads, culprit), modules in wrong.items():
        kind = "pattern-too-wide" if culprit.startswith("ignore") else "scheme-mismatch"
        where = f"quantization_config{culprit and f'.{culprit}'}: {listed(modules)}"
        found = f"{len(modules)} modules would load as {loads}"
        yield finding(kind, where, found, f"{stored}, as they are stored")
    for platform, layers in unnamed.items():
        where = "quantization_config.config_groups: targets of routed experts"
        found = f"none for {', '.join(_EXPERT_NAMES[platform].values())} in {len(layers)} layers"
        severity: Severity = "error" if target.platform in (platform, None) else "warning"
        yield finding("expert-target-names", where, found, "both w1 and gate_proj, ...", severity)


_Wrong = dict[tuple[str, str, str], list[str]]


def _compare(checkpoint: Checkpoint) -> tuple[_Wrong, dict[str, dict[int, str]]]:
    """Return what is wrong, and which layers' experts have a scheme under other names alone.

    The first: (stored format, format that loads, what in the section does it) -> modules. The
    second: platform -> layer -> the group that the other platform finds. Patterns for `mtp.0` count
    as corrected, so that one mistake is one finding.
    """
    wrong: _Wrong = {}
    unnamed: dict[str, dict[int, str]] = {}
    if not isinstance(checkpoint.quantization, QuantizationConfig):
        return wrong, unnamed
    quantization = read_quantization({"quantization_config": with_right_patterns(checkpoint)})
    kinds = {key: group.kind for key, group in quantization.config_groups.items()}
    for module in checkpoint.modules.values():
        for layer, asked in _asked(module, checkpoint.num_layers):
            groups = {p: quantization.group_of(name) for p, name in asked.items()}
            loads = {p: kinds[key] if key else "plain" for p, key in groups.items()}
            bad = [platform for platform in loads if loads[platform] != module.format]
            for platform in bad:
                ignored = quantization.ignored_by(asked[platform])
                others = [key for key in groups.values() if key]
                if len(bad) == 1 and not ignored and not groups[platform] and others:
                    unnamed.setdefault(platform, {})[layer] = others[0]
                    continue
                group = f"config_groups.{groups[platform]}" if groups[platform] else ""
                culprit = f"ignore: {ignored}" if ignored else group
                stored = "quantized" if ignored else str(module.format)
                place = (stored, loads[platform], culprit)
                wrong.setdefault(place, []).append(asked[platform])
    return wrong, unnamed


def _asked(module: Module, num_layers: int) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield a linear's layer, and platform -> the name by which vLLM asks for its scheme.

    Of the experts only the first: vLLM asks for no other.
    """
    layer, _, name = module.stem.removeprefix("layers.").partition(".")
    if module.stem.startswith("mtp.0."):
        layer, name = str(num_layers), module.stem.removeprefix("mtp.0.")
    is_linear = "" not in module.parts and module.weight is not None and module.weight.dim() == 2
    if module.format is None or not is_linear or not layer.isdigit():
        return
    if NEVER_QUANTIZED.search(module.stem) or name in ("ffn.gate", "head", "emb.tok_emb"):
        return
    if not is_expert(module.stem):
        yield int(layer), {"any": f"model.layers.{layer}.{name}"}
    elif name.startswith("ffn.experts.0."):
        prefix, matrix = f"model.layers.{layer}.ffn.experts.0.", name.rpartition(".")[2]
        yield int(layer), {p: prefix + names[matrix] for p, names in _EXPERT_NAMES.items()}


def with_right_patterns(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the section with lists where it may have null, and the head's layer for `mtp.0`."""
    section: dict[str, Any] = deepcopy(checkpoint.config["quantization_config"])
    holders = [(section, "ignore"), *((g, "targets") for g in section["config_groups"].values())]
    for holder, key in holders:
        holder[key] = [_for_vllm(p, checkpoint.num_layers) for p in holder.get(key) or []]
    return section


def corrected(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the section with all that --fix cures."""
    section = with_right_patterns(checkpoint)
    groups: Mapping[str, Any] = section["config_groups"]
    assert isinstance(checkpoint.quantization, QuantizationConfig)
    for key, group in checkpoint.quantization.config_groups.items():
        if group.kind == "int4":
            groups[key]["weights"]["group_size"] = checkpoint.group_size
    for platform, layers in _compare(checkpoint)[1].items():
        matrices = "|".join(_EXPERT_NAMES[platform].values())
        for layer, key in layers.items():
            target = rf"re:.*layers\.{layer}\.ffn\.experts\.\d+\.({matrices})$"
            groups[key]["targets"].append(target)
    return section
