"""The `quantization_config` of a W4A16-FP8 checkpoint, as compressed-tensors and vLLM read it.

Engines ask for a module's scheme by their own name for it, and the names differ: vLLM's CUDA model
says `...experts.0.w1`, its CPU model `...experts.0.gate_proj`; the head's modules are asked for as
layer `num_hidden_layers`, never as `mtp.0`. Patterns are anchored at a dot, because an unanchored
`re:.*e_proj` also matches `gate_proj`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from mtp_graft.errors import GraftError, in_words
from mtp_graft.recipe import Linears, Variant

EXPERT_MATRIX = r"(w1|w2|w3|gate_proj|up_proj|down_proj)"
#: Modules that vLLM builds as one, and what a checkpoint calls their parts.
_FUSED = {
    "fused_wqa_wkv": ("wq_a", "wkv"),
    "fused_wkv_wgate": ("wkv", "wgate"),
    "gate_up_proj": ("w1", "w3"),
}
#: A checkpoint's name -> that of the module in vLLM which loads it.
_LOADED_BY = (
    (re.compile(r"\.attn\.(wq_a|wkv)$"), ".attn.fused_wqa_wkv"),
    (re.compile(r"\.compressor\.(wkv|wgate)$"), ".compressor.fused_wkv_wgate"),
    (re.compile(r"\.shared_experts\.(w1|w3|gate_proj|up_proj)$"), ".shared_experts.gate_up_proj"),
    (re.compile(r"\.shared_experts\.w2"), ".shared_experts.down_proj"),
)


def _arguments(num_bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    known = {"num_bits": num_bits, "type": kind, "strategy": strategy}
    return {**known, "symmetric": True, "dynamic": False, **more}


FP8_BLOCK: dict[str, Any] = {
    "format": "float-quantized",
    "weights": _arguments(8, "float", "block", block_structure=[128, 128]),
    "input_activations": _arguments(8, "float", "group", group_size=128, dynamic=True),
}
_MXFP4: dict[str, Any] = {
    "format": "mxfp4-pack-quantized",
    "weights": _arguments(4, "float", "group", group_size=32)
    | {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
}


def add_head(
    config: dict[str, Any], head_layer: int, variant: Variant, linears: Linears
) -> dict[str, Any]:
    """Return `config` extended by the head's modules, which vLLM names layer `head_layer`.

    The base's groups cover the head's attention and INT4 experts; `linears` says what the other
    linears are (`dsv4.variants` explains it).
    """
    layer = rf"re:.*layers\.{head_layer}\."
    projections, ffn = rf"{layer}(e_proj|h_proj)$", rf"{layer}(mtp_block\.)?ffn\."
    shared = rf"{ffn}shared_experts\."
    patterns: dict[Linears, tuple[list[str], list[str]]] = {
        "fp8": ([projections, rf"{shared}{EXPERT_MATRIX}$"], []),
        "base": ([projections], [rf"{shared}.*"]),
        "bf16": ([], [projections, rf"{shared}.*"]),
    }
    fp8, plain = patterns[linears]
    groups, ignore = dict(config["config_groups"]), [*(config.get("ignore") or []), *plain]
    if fp8:
        groups["mtp_projections"] = {"targets": fp8, **FP8_BLOCK}
    if variant == "mxfp4":  # the first match wins, so before the base's groups
        experts = {"targets": [rf"{ffn}experts\.\d+\.{EXPERT_MATRIX}$"], **_MXFP4}
        groups = {"mtp_experts": experts, **groups}
    elif variant == "bf16":
        ignore += [rf"{ffn}experts\..*"]
    return {**config, "config_groups": groups, "ignore": ignore}


def _check_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
    return pattern


#: A module's name, `re:` and a regular expression, or, of targets, the name of a class.
Pattern = Annotated[str, AfterValidator(_check_pattern)]
_Count = Annotated[int, Field(ge=1, le=2**16)]


class Weights(BaseModel):
    """How a group's weights are quantized: what matters here of compressed-tensors' arguments."""

    num_bits: Annotated[int, Field(ge=1, le=64)] = 8
    type: str = "int"
    strategy: str | None = None
    group_size: _Count | Literal[-1] | None = None  # -1: a scale a channel


class Group(BaseModel):
    """A scheme and the modules that have it."""

    targets: list[Pattern]
    weights: Weights | None = None

    @property
    def kind(self) -> str:
        """Return `int4`, `mxfp4`, `nvfp4` or `fp8`, and other schemes in words."""
        if (w := self.weights) is None:
            return "plain"
        strategy = w.strategy or ("group" if (w.group_size or 0) > 0 else "tensor")
        known = {
            ("int", 4, "group"): "int4",
            ("float", 4, "group"): "mxfp4" if w.group_size == 32 else "nvfp4",
            ("float", 4, "tensor_group"): "nvfp4",
            ("float", 8, "block"): "fp8",
        }
        return known.get((w.type, w.num_bits, strategy), f"{w.num_bits}-bit {w.type} by {strategy}")


class QuantizationConfig(BaseModel):
    """The section as vLLM reads it: which group, if any, has the scheme of a module."""

    quant_method: Literal["compressed-tensors"]
    config_groups: dict[str, Group]
    ignore: Annotated[list[Pattern], BeforeValidator(lambda value: value or [])] = []

    def group_of(self, module: str) -> str | None:
        """Return the key of the group whose scheme loads a module; None if it is not quantized.

        `module` is vLLM's name, or vLLM's name of the layer and a checkpoint's within it. The first
        target that matches wins: names and patterns, then those of the parts of a module that vLLM
        fuses, then classes. Raises GraftError for a module that is ignored in part.
        """
        if self.ignored_by(module) is not None:
            return None
        for names in _asked_as(module):
            found = [_first(self._targets, name) for name in names]
            if found[0] is not None and all(found):
                return self._targets[found[0]]
        return next((key for t, key in self._targets.items() if t.lower() in "linear"), None)

    def ignored_by(self, module: str) -> str | None:
        """Return the ignore pattern that leaves a module without a scheme; raises likewise."""
        for names in _asked_as(module):
            found = [_first(self._ignored, name) for name in names]
            if all(found):
                return found[0]
            if pattern := next(filter(None, found), None):
                raise GraftError(
                    f"quantization_config: ignore has a part of {module} ({pattern}) and not the "
                    "other; vLLM wants one scheme for both"
                )
        return None

    def kind_of(self, key: str | None) -> str:
        """Return the kind of a group by its key; `plain` for None."""
        return "plain" if key is None else self.config_groups[key].kind

    @cached_property
    def _ignored(self) -> list[str]:
        return [_mapped(pattern) for pattern in self.ignore]

    @cached_property
    def _targets(self) -> dict[str, str]:
        """Return target -> its group's key, in the order in which vLLM tries them."""
        return {_mapped(t): key for key, group in self.config_groups.items() for t in group.targets}


def _asked_as(module: str) -> Iterator[list[str]]:
    """Yield the names by which vLLM looks for a module: its own, then those of its parts."""
    for pattern, replacement in _LOADED_BY:
        module = pattern.sub(replacement, module)
    yield [module]
    before, _, name = module.rpartition(".")
    if name in _FUSED:
        yield [f"{before}.{part}" for part in _FUSED[name]]


def _first(patterns: Iterable[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if _matches(pattern, name)), None)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern == name


def _mapped(pattern: str) -> str:
    """Return a pattern as vLLM maps it: full names become its own, all else stays."""
    if pattern.startswith("re:"):
        return pattern
    pattern = pattern.replace(".shared_experts.w2", ".shared_experts.down_proj")
    return f"model.{pattern}" if pattern.startswith("layers.") else pattern


def read_quantization(
    config: Mapping[str, Any], path: Path | str = "config.json"
) -> QuantizationConfig:
    """Return a config.json's section; raises GraftError for one that vLLM cannot read."""
    try:
        return QuantizationConfig.model_validate(config.get("quantization_config"))
    except ValidationError as error:
        raise GraftError(
            f"{path}: quantization_config: {in_words(error)}; expected the compressed-tensors "
            "section of a W4A16-FP8 checkpoint"
        ) from error


def scheme_of(config: dict[str, Any], module: str) -> dict[str, Any] | None:
    """Return the group of a `quantization_config` that `QuantizationConfig.group_of` finds."""
    key = read_quantization({"quantization_config": config}).group_of(module)
    return None if key is None else config["config_groups"][key]


def int4_group_size(config: dict[str, Any]) -> int:
    """Return the inputs per scale of the base's INT4 group; GraftError if it has no single one."""
    groups = read_quantization({"quantization_config": config}).config_groups.values()
    sizes = {group.weights.group_size for group in groups if group.weights and group.kind == "int4"}
    if len(sizes) != 1 or (size := sizes.pop()) is None or size < 1:
        raise GraftError(
            f"quantization_config: has {len(sizes)} INT4 group sizes, expected one; is this a "
            "W4A16-FP8 base?"
        )
    return size
