"""The `quantization_config` of a W4A16-FP8 checkpoint, as compressed-tensors and vLLM read it.

Engines ask for a module's scheme by its own name for it, and the names differ: vLLM's CUDA model
says `...experts.0.w1`, its CPU model `...experts.0.gate_proj`; the head's modules are asked for as
layer `num_hidden_layers`, never as `mtp.0`. Patterns are anchored at a dot, because an unanchored
`re:.*e_proj` also matches `gate_proj`.
"""

from copy import deepcopy
from typing import Any, Literal

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
    config: dict[str, Any], head_layer: int, experts: ExpertFormat, fp8_projections: bool
) -> dict[str, Any]:
    """Return `config` extended by the head's modules, which vLLM names layer `head_layer`.

    The head's attention is covered by the base's FP8 group and INT4 experts by its INT4 group.
    `fp8_projections` says that e_proj and h_proj are FP8_BLOCK too; else they are BF16.
    """
    layer = rf"re:.*layers\.{head_layer}\."
    groups = dict(config["config_groups"])
    ignore = list(config.get("ignore", []))
    if fp8_projections:
        groups["mtp_projections"] = {"targets": [rf"{layer}(e_proj|h_proj)$"], **_FP8_BLOCK}
    else:
        ignore.append(rf"{layer}(e_proj|h_proj)$")
    # First match wins, so a head in another format goes before the base's groups.
    if experts == "mxfp4":
        expert_target = rf"{layer}(mtp_block\.)?ffn\.experts\.\d+\.{_EXPERT_MATRIX}$"
        groups = {"mtp_experts": {"targets": [expert_target], **_MXFP4}, **groups}
    elif experts == "bf16":
        ignore.append(rf"{layer}(mtp_block\.)?ffn\.experts\..*")
    ignore.append(rf"{layer}(mtp_block\.)?ffn\.shared_experts\..*")
    return {**config, "config_groups": groups, "ignore": ignore}
