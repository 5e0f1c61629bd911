"""The `quantization_config` of a W4A16-FP8 checkpoint, as compressed-tensors and vLLM read it.

Engines ask for a module's scheme by its own name for it, and the names differ: vLLM's CUDA model
says `...experts.0.w1`, its CPU model `...experts.0.gate_proj`; the head's modules are asked for as
layer `num_hidden_layers`, never as `mtp.0`. Patterns are anchored at a dot, because an unanchored
`re:.*e_proj` also matches `gate_proj`.
"""

import re
from copy import deepcopy
from typing import Any, Literal

from mtp_graft.errors import GraftError
from mtp_graft.recipe import Linears

#: Formats of the head's routed experts that a checkpoint can carry.
ExpertFormat = Literal["int4", "mxfp4", "bf16"]

_EXPERT_MATRIX = r"(w1|w2|w3|gate_proj|up_proj|down_proj)"

_FP8_BLOCK: dict[str, Any] = {
    "format": "float-quantized",
    "weights": {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [128, 128],
        "symmetric": True,
        "dynamic": False,
    },
    "input_activations": {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": 128,
        "symmetric": True,
        "dynamic": True,
    },
}
_INT4: dict[str, Any] = {
    "format": "pack-quantized",
    "weights": {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 128,
        "symmetric": True,
        "dynamic": False,
    },
}
_MXFP4: dict[str, Any] = {
    "format": "mxfp4-pack-quantized",
    "weights": {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    },
}


def base_quantization_config() -> dict[str, Any]:
    """Return the config of a base: FP8_BLOCK attention linears, INT4 g128 routed experts."""
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": [r"re:.*\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)$", r"re:.*\.indexer\.wq_b$"],
                **_FP8_BLOCK,
            },
            "group_1": {
                "targets": [rf"re:.*\.ffn\.experts\.\d+\.{_EXPERT_MATRIX}$"],
                **_INT4,
            },
        },
        "ignore": ["lm_head", "head"],
    }
    return deepcopy(config)


def add_head(
    config: dict[str, Any], head_layer: int, experts: ExpertFormat, linears: Linears
) -> dict[str, Any]:
    """Return `config` extended by the head's modules, which vLLM names layer `head_layer`.

    The head's attention is covered by the base's FP8 group and INT4 experts by its INT4 group.
    Its other linears are FP8_BLOCK or BF16 as `linears` says (`dsv4.variants` explains it).
    """
    layer = rf"re:.*layers\.{head_layer}\."
    groups = dict(config["config_groups"])
    ignore = list(config.get("ignore", []))
    fp8: list[str] = []
    (ignore if linears == "bf16" else fp8).append(rf"{layer}(e_proj|h_proj)$")
    shared = rf"{layer}(mtp_block\.)?ffn\.shared_experts\."
    if linears == "fp8":
        fp8.append(rf"{shared}{_EXPERT_MATRIX}$")
    else:
        ignore.append(rf"{shared}.*")
    if fp8:
        groups["mtp_projections"] = {"targets": fp8, **_FP8_BLOCK}
    # First match wins, so a head in another format goes before the base's groups.
    if experts == "mxfp4":
        expert_target = rf"{layer}(mtp_block\.)?ffn\.experts\.\d+\.{_EXPERT_MATRIX}$"
        groups = {"mtp_experts": {"targets": [expert_target], **_MXFP4}, **groups}
    elif experts == "bf16":
        ignore.append(rf"{layer}(mtp_block\.)?ffn\.experts\..*")
    return {**config, "config_groups": groups, "ignore": ignore}


def scheme_of(config: dict[str, Any], module: str) -> dict[str, Any] | None:
    """Return the group that covers a module, by the engine's name for it; None if none does.

    As vLLM looks it up: what is ignored has no scheme, and the first group that matches wins. A
    target that is a class name (`Linear`) matches every linear, after the patterns.
    """
    if any(_matches(pattern, module) for pattern in config.get("ignore", [])):
        return None
    groups: list[dict[str, Any]] = list(config["config_groups"].values())
    for group in groups:
        if any(_matches(target, module) for target in group["targets"]):
            return group
    return next((group for group in groups if "Linear" in group["targets"]), None)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern == name


def check_head(
    config: dict[str, Any], head_layer: int, experts: ExpertFormat, linears: Linears
) -> None:
    """Check that every module of the head finds the scheme it is stored in.

    Raises GraftError for a module that the base's own groups or ignore list take elsewhere: it
    would load as noise, or not at all.
    """
    layer = f"model.layers.{head_layer}"
    expert_format = {"int4": _INT4["format"], "mxfp4": _MXFP4["format"], "bf16": None}[experts]
    expected: dict[str, str | None] = {
        f"{layer}.ffn.experts.0.{m}": expert_format
        for m in ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
    }
    fp8, bf16 = _FP8_BLOCK["format"], None
    attention = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")
    expected |= {f"{layer}.attn.{name}": fp8 for name in attention}
    projections = bf16 if linears == "bf16" else fp8
    expected |= {f"{layer}.{name}": projections for name in ("e_proj", "h_proj")}
    shared = fp8 if linears == "fp8" else bf16
    expected |= {f"{layer}.ffn.shared_experts.{m}": shared for m in ("w1", "w2", "w3")}
    for module, wanted in expected.items():
        group = scheme_of(config, module)
        found = None if group is None else group.get("format", config.get("format"))
        if found != wanted:
            raise GraftError(
                f"quantization_config: {module} would load as {found or 'unquantized'}, expected "
                f"{wanted or 'unquantized'}; the base's targets or ignore list differ from a "
                "W4A16-FP8 base's: correct its config.json"
            )


def int4_group_size(config: dict[str, Any]) -> int:
    """Return the inputs per scale of the base's INT4 group; GraftError if it has no single one."""
    weights = [group.get("weights") or {} for group in config["config_groups"].values()]
    sizes = {
        each.get("group_size")
        for each in weights
        if (each.get("type"), each.get("num_bits")) == ("int", 4)
    }
    if len(sizes) != 1 or not isinstance(size := sizes.pop(), int):
        raise GraftError(
            f"quantization_config: has {len(sizes)} INT4 group sizes, expected one; is this a "
            "W4A16-FP8 base?"
        )
    return size
