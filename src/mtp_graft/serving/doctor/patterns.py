"""The quantization config's patterns: which modules vLLM asks for, and what is amiss with each.

A pattern with a known mistake has a corrected form. Later checks go by the corrected config, so
that one mistake is one finding.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from mtp_graft.checkpoint.quantization_config import scheme_of

#: Names of an expert's matrices: on CUDA vLLM asks for the first three, on a CPU for the others.
FAMILIES = (("w1", "w2", "w3"), ("gate_proj", "down_proj", "up_proj"))

_ATTENTION = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")
_OTHERS = (
    *(f"attn.{name}" for name in ("indexer.wq_b", "indexer.weights_proj")),
    *(f"attn.{c}.{m}" for c in ("compressor", "indexer.compressor") for m in ("wkv", "wgate")),
    *(f"ffn.shared_experts.{name}" for name in ("w1", "w2", "w3", "gate_proj", "up_proj")),
    "ffn.shared_experts.down_proj",
    "ffn.gate",
    *("e_proj", "h_proj", "head", "shared_head.head", "eh_proj"),
)
_MTP_REGEX = re.compile(r"^\^?(\.\*)?(model\\?\.)?mtp\\?\.0\\?\.")
_MTP_NAME = re.compile(r"^(model\.)?mtp\.0\.")
_SUFFIX = re.compile(r"^re:\.\*(?P<suffix>[A-Za-z_]+)\$?$")

Mistake = Literal["names-mtp", "too-wide"]


@dataclass(frozen=True)
class Amiss:
    """A pattern with a mistake: where it stands, and how it should read (None: unknown)."""

    mistake: Mistake
    place: str
    pattern: str
    corrected: str


def module_name(layer: int, name: str) -> str:
    """Return the name that vLLM has for a module of a layer."""
    return f"model.layers.{layer}.{name}"


def asked_modules(config: Mapping[str, Any], all_experts: bool) -> Iterator[str]:
    """Yield the names of modules that vLLM could ask a scheme for, head included."""
    yield from ("lm_head", "head", "embed", "model.embed_tokens", "model.embed")
    experts = range(int(config.get("n_routed_experts", 1)) if all_experts else 1)
    for layer in range(int(config["num_hidden_layers"]) + 1):
        yield from (module_name(layer, f"attn.{name}") for name in _ATTENTION)
        yield from (module_name(layer, name) for name in _OTHERS)
        for expert in experts:
            for family in FAMILIES:
                stem = module_name(layer, f"ffn.experts.{expert}.")
                yield from (stem + matrix for matrix in family)


def matches(pattern: str, module: str) -> bool:
    """Say whether a pattern covers a module, as vLLM decides it, with `model.` or without."""
    plain = module.removeprefix("model.")
    if pattern.startswith("re:"):
        compiled = _compiled(pattern.removeprefix("re:"))
        return compiled is not None and bool(compiled.match(module) or compiled.match(plain))
    return pattern in (module, plain, plain.removeprefix("layers."))


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None  # vLLM stops at it; it is reported as one that matches nothing


def places(quantization: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield each list of patterns with the place where it stands."""
    yield "ignore", list(quantization.get("ignore") or [])
    for name, group in quantization["config_groups"].items():
        yield f"config_groups.{name}.targets", list(group["targets"])


def amiss(quantization: Mapping[str, Any], num_layers: int) -> list[Amiss]:
    """Return the patterns with a known mistake."""
    found = []
    for place, patterns in places(quantization):
        for pattern in patterns:
            renamed = _for_vllm(pattern, num_layers)
            if renamed != pattern:
                found.append(Amiss("names-mtp", place, pattern, renamed))
            elif (match := _SUFFIX.match(pattern)) and _splits_an_expert(pattern):
                anchored = rf"re:.*\.{match['suffix']}$"
                found.append(Amiss("too-wide", place, pattern, anchored))
    return found


def _for_vllm(pattern: str, num_layers: int) -> str:
    """Return a pattern for `mtp.0` as one for the head's layer in vLLM, others as they are."""
    if pattern.startswith("re:"):
        body = pattern.removeprefix("re:")
        layer = rf".*layers\\.{num_layers}\\."
        return "re:" + _MTP_REGEX.sub(layer, body)
    return _MTP_NAME.sub(f"model.layers.{num_layers}.", pattern)


def _splits_an_expert(pattern: str) -> bool:
    """Say whether a pattern covers some but not all of an expert's matrices."""
    for family in FAMILIES:
        covered = [matches(pattern, module_name(0, f"ffn.experts.0.{m}")) for m in family]
        if any(covered) and not all(covered):
            return True
    return False


def corrected(quantization: Mapping[str, Any], mistakes: Iterable[Amiss]) -> dict[str, Any]:
    """Return the config with the corrected form of each pattern, and both names of experts."""
    result = deepcopy(dict(quantization))
    for mistake in mistakes:
        holder = result
        *path, key = mistake.place.split(".")
        for step in path:
            holder = holder[step]
        holder[key] = [mistake.corrected if p == mistake.pattern else p for p in holder[key]]
    return result


def as_mapped(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config as vLLM maps it: full names, not regular expressions, become its own."""
    result = deepcopy(dict(quantization))
    result["ignore"] = [_mapped(pattern) for pattern in result.get("ignore") or []]
    for group in result["config_groups"].values():
        group["targets"] = [_mapped(pattern) for pattern in group["targets"]]
    return result


def _mapped(pattern: str) -> str:
    if pattern.startswith("re:"):
        return pattern
    pattern = pattern.replace(".shared_experts.w2", ".shared_experts.down_proj")
    return f"model.{pattern}" if pattern.startswith("layers.") else pattern


def half_named_experts(quantization: dict[str, Any], num_layers: int) -> dict[int, int]:
    """Return layer -> index in FAMILIES of the names that find no scheme while the others do."""
    missing: dict[int, int] = {}
    for layer in range(num_layers + 1):
        found = [
            scheme_of(quantization, module_name(layer, f"ffn.experts.0.{family[0]}"))
            for family in FAMILIES
        ]
        if (found[0] is None) != (found[1] is None):
            missing[layer] = found.index(None)
    return missing


def with_both_names(quantization: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return the config with targets for the names of experts that find no scheme."""
    result = deepcopy(quantization)
    missing = half_named_experts(quantization, num_layers)
    for layer, family in missing.items():
        other = module_name(layer, f"ffn.experts.0.{FAMILIES[1 - family][0]}")
        group = next(
            g
            for g in result["config_groups"].values()
            if any(matches(target, other) for target in g["targets"])
        )
        layers = r"\d+" if len(missing) > num_layers else str(layer)
        names = "|".join(FAMILIES[family])
        target = rf"re:.*layers\.{layers}\.ffn\.experts\.\d+\.({names})$"
        if target not in group["targets"]:
            group["targets"].append(target)
    return result
