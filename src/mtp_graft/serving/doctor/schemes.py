"""Checks of quantization_config: every module must find the scheme that it is stored in."""

from collections.abc import Iterator, Mapping
from typing import Any

from mtp_graft.checkpoint.quantization_config import scheme_of
from mtp_graft.dsv4.names import NEVER_QUANTIZED
from mtp_graft.dsv4.variants import is_expert
from mtp_graft.serving.doctor.findings import Finding, Severity, listed
from mtp_graft.serving.doctor.formats import format_of, format_of_group
from mtp_graft.serving.doctor.patterns import (
    FAMILIES,
    amiss,
    as_mapped,
    asked_modules,
    corrected,
    half_named_experts,
    matches,
    module_name,
    places,
    with_both_names,
)
from mtp_graft.serving.doctor.survey import Survey
from mtp_graft.serving.doctor.target import Target


def usable(survey: Survey) -> bool:
    """Say whether there is a compressed-tensors section with groups to look at."""
    section = survey.config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != "compressed-tensors":
        return False
    groups = section.get("config_groups")
    return (
        isinstance(groups, dict)
        and bool(groups)
        and all(_is_group(group) for group in groups.values())
        and _are_patterns(section.get("ignore") or [])
    )


def _is_group(group: Any) -> bool:
    return (
        isinstance(group, dict)
        and _are_patterns(group.get("targets"))
        and isinstance(group.get("weights") or {}, dict)
    )


def _are_patterns(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(pattern, str) for pattern in found)


def corrected_section(survey: Survey) -> dict[str, Any]:
    """Return the section with every pattern that has a known mistake corrected."""
    section = survey.config["quantization_config"]
    section = corrected(section, amiss(section, survey.num_layers))
    for group in section["config_groups"].values():
        if format_of_group(group) == "int4":
            group["weights"]["group_size"] = survey.group_size
    return with_both_names(section, survey.num_layers)


def group_sizes(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find INT4 groups whose size is not the one that experts are stored with."""
    if not usable(survey) or not any(format_of(p) == "int4" for p in survey.stems.values()):
        return
    for name, group in survey.config["quantization_config"]["config_groups"].items():
        found = (group.get("weights") or {}).get("group_size")
        if format_of_group(group) == "int4" and found != survey.group_size:
            yield Finding(
                "group-size",
                "error",
                f"quantization_config.config_groups.{name}.weights.group_size",
                repr(found),
                f"{survey.group_size}, by the shapes of the scales",
                "vLLM makes room for another number of scales. On a CPU it was seen to serve "
                "without a word, with scales of other groups: noise. Elsewhere it stops at a shape",
                "--fix sets the size that the scales have",
                fixable=True,
            )


def no_section(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find a config without a quantization section although tensors are quantized."""
    stored = {format_of(parts) for parts in survey.stems.values()}
    if not usable(survey) and stored & {"int4", "mxfp4", "fp8"}:
        section = survey.config.get("quantization_config")
        yield Finding(
            "quantization-config",
            "error",
            "config.json: quantization_config",
            "absent" if section is None else _method_and_lists(section),
            "compressed-tensors with config_groups, targets and ignore as lists of patterns",
            "vLLM builds unquantized layers and stops with a KeyError at the first `weight_packed` "
            "or `weight_scale`; with another quant_method, at the names that one expects",
            "take quantization_config from the base's release, and splice again",
        )


def _method_and_lists(section: Any) -> str:
    if not isinstance(section, dict) or section.get("quant_method") != "compressed-tensors":
        return repr(section.get("quant_method") if isinstance(section, dict) else section)
    return "config_groups or ignore that cannot be read"


def patterns_for_mtp(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find patterns written for `mtp.0`, a name that vLLM never asks for."""
    for mistake in _mistakes(survey, "names-mtp"):
        yield Finding(
            "pattern-names-mtp",
            "error",
            f"quantization_config.{mistake.place}",
            mistake.pattern,
            mistake.corrected,
            f"vLLM looks the head up as model.layers.{survey.num_layers}, so the pattern matches "
            "nothing: a BF16 module is built as a quantized one, or the reverse, and loading "
            "stops with a KeyError or leaves it unfilled",
            "--fix names the layer",
            fixable=True,
        )


def patterns_too_wide(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find unanchored patterns that also cover a part of every expert."""
    for mistake in _mistakes(survey, "too-wide"):
        yield Finding(
            "pattern-too-wide",
            "error",
            f"quantization_config.{mistake.place}",
            mistake.pattern,
            mistake.corrected,
            "it also matches experts' gate_proj, so their matrices find different schemes. vLLM "
            "stops: 'All MoE projections need to have same quantization scheme but found multiple'",
            "--fix anchors it at a dot",
            fixable=True,
        )


def _mistakes(survey: Survey, kind: str) -> Iterator[Any]:
    if usable(survey):
        section = survey.config["quantization_config"]
        yield from (m for m in amiss(section, survey.num_layers) if m.mistake == kind)


def idle_patterns(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find patterns that cover no module."""
    if not usable(survey):
        return
    section = corrected_section(survey)
    few = list(asked_modules(survey.config, all_experts=False))
    idle = [
        (place, pattern)
        for place, patterns in places(section)
        for pattern in patterns
        if not pattern[:1].isupper() and not any(matches(pattern, module) for module in few)
    ]
    if idle:
        every = [*asked_modules(survey.config, all_experts=True), *survey.stems]
        idle = [(place, p) for place, p in idle if not any(matches(p, m) for m in every)]
    if idle:
        yield Finding(
            "pattern-matches-nothing",
            "warning",
            listed(f"quantization_config.{place}: {pattern}" for place, pattern in idle),
            f"{len(idle)} patterns that match no module",
            "every pattern matches a module that vLLM asks for",
            "nothing by itself; a misspelled one leaves its modules to another group or to none",
            "correct or remove it; docs/format.md lists the names",
        )


def half_named(survey: Survey, target: Target) -> Iterator[Finding]:
    """Find experts that have a scheme under one set of names only."""
    if not usable(survey):
        return
    section = survey.config["quantization_config"]
    section = corrected(section, amiss(section, survey.num_layers))
    layers = {
        layer: family
        for layer, family in half_named_experts(section, survey.num_layers).items()
        if layer < survey.num_layers or survey.has_head
    }
    if layers:
        family = next(iter(layers.values()))
        asked = {"cuda": 0, "cpu": 1, None: family}[target.platform]
        severity: Severity = "error" if asked == family else "warning"
        yield Finding(
            "expert-target-names",
            severity,
            "quantization_config.config_groups: targets of routed experts",
            f"none for {', '.join(FAMILIES[family])} in {len(layers)} layers",
            "both w1, w2, w3 and gate_proj, down_proj, up_proj",
            "CUDA builds ask for the first names, CPU builds for the second. An "
            "expert without a scheme is built unquantized, in several times the memory, and "
            "loading stops with a KeyError at `weight_packed`",
            "--fix adds the other names",
            fixable=True,
        )


def mismatches(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find modules that are stored in another format than their scheme loads."""
    if not usable(survey):
        return
    section = as_mapped(corrected_section(survey))
    reported = {f"ignore: {m.corrected}" for m in _mistakes(survey, "too-wide")}
    wrong: dict[tuple[str, str, str], list[str]] = {}
    for module, stored in _stored_modules(survey):
        loads = format_of_group(scheme_of(section, module))
        if loads != stored and (culprit := _culprit(section, module)) not in reported:
            wrong.setdefault((stored, loads, culprit), []).append(module)
    for (stored, loads, culprit), modules in wrong.items():
        ignored = culprit.startswith("ignore")
        yield Finding(
            "pattern-too-wide" if ignored else "scheme-mismatch",
            "error",
            f"quantization_config{'.' + culprit if culprit else ''}: {listed(modules)}",
            f"{len(modules)} modules would load as {_words(loads)}",
            f"{_words(stored)}, as they are stored",
            "vLLM builds the layer for one format and is given another: it stops with a KeyError "
            "or at a shape, or, where names and shapes happen to fit, computes noise",
            "narrow the pattern to what is not quantized"
            if ignored
            else "correct the group or the ignore list; splicing again writes the head's part",
        )


def _words(stored: str) -> str:
    return "unquantized" if stored == "plain" else stored


def _culprit(section: Mapping[str, Any], module: str) -> str:
    """Return the ignore pattern that covers a module, or else the group's name."""
    for pattern in section.get("ignore") or []:
        if matches(pattern, module):
            return f"ignore: {pattern}"
    group = scheme_of(dict(section), module)
    names = [name for name, each in section["config_groups"].items() if each is group]
    return f"config_groups.{names[0]}" if names else ""


def _stored_modules(survey: Survey) -> Iterator[tuple[str, str]]:
    """Yield vLLM's names of the linears in the checkpoint, with the format they are stored in.

    Of the experts only the first: vLLM asks for no other.
    """
    for stem, parts in survey.stems.items():
        stored = format_of(parts)
        layer, _, name = stem.removeprefix("layers.").partition(".")
        if stem.startswith("mtp.0."):
            layer, name = str(survey.num_layers), stem.removeprefix("mtp.0.")
        if stored is None or not layer.isdigit() or NEVER_QUANTIZED.search(stem):
            continue
        if is_expert(stem):
            if name.startswith("ffn.experts.0."):
                position = FAMILIES[0].index(name.rpartition(".")[2])
                for family in FAMILIES:
                    expert = f"ffn.experts.0.{family[position]}"
                    yield module_name(int(layer), expert), stored
        elif _is_linear(name, parts):
            asked = name.replace("shared_experts.w2", "shared_experts.down_proj")
            yield module_name(int(layer), asked), stored


def _is_linear(name: str, parts: Mapping[str, Any]) -> bool:
    matrix = parts.get("weight", parts.get("weight_packed"))
    return matrix is not None and matrix.dim() == 2 and name != "ffn.gate"
