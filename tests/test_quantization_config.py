"""Which scheme an engine finds for each module, by the names engines use."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig
from torch import nn

from mtp_graft.checkpoint.quantization_config import (
    ExpertFormat,
    add_head,
    base_quantization_config,
)
from mtp_graft.recipe import Linears

LAYER = "model.layers.4"
EXPERT_MATRICES = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


EXPERT_FORMATS: dict[ExpertFormat, str | None] = {
    "int4": "pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "bf16": None,
}


@pytest.fixture(params=EXPERT_FORMATS)
def experts(request: pytest.FixtureRequest) -> ExpertFormat:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["fp8", "base", "bf16"])
def linears(request: pytest.FixtureRequest) -> Linears:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def config(experts: ExpertFormat, linears: Linears) -> dict[str, Any]:
    return add_head(base_quantization_config(), 4, experts, linears)


@pytest.fixture
def expected(experts: ExpertFormat, linears: Linears) -> dict[str, str | None]:
    """Module name -> stored format, None for unquantized."""
    attention = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b")
    unquantized = ("head", "shared_head.head", "ffn.gate", "enorm")
    schemes: dict[str, str | None] = {}
    for name in EXPERT_MATRICES:
        shared = "float-quantized" if linears == "fp8" else None
        schemes[f"{LAYER}.ffn.shared_experts.{name}"] = shared
    for name in ("e_proj", "h_proj"):
        schemes[f"{LAYER}.{name}"] = None if linears == "bf16" else "float-quantized"
    for name in attention:
        schemes[f"{LAYER}.{name}"] = "float-quantized"
    for name in unquantized:
        schemes[f"{LAYER}.{name}"] = None
    for expert in (0, 63):
        for matrix in EXPERT_MATRICES:
            schemes[f"{LAYER}.ffn.experts.{expert}.{matrix}"] = EXPERT_FORMATS[experts]
    # The base's layers, and layers of a larger model whose number contains the head's.
    for layer in (0, 3, 14, 40, 44):
        stem = f"model.layers.{layer}"
        schemes |= {f"{stem}.{name}": "float-quantized" for name in attention}
        schemes |= {f"{stem}.ffn.experts.7.{m}": "pack-quantized" for m in EXPERT_MATRICES}
        schemes |= {f"{stem}.ffn.shared_experts.{m}": None for m in EXPERT_MATRICES}
        schemes |= {f"{stem}.attn.compressor.{m}": None for m in ("wkv", "wgate")}
        schemes[f"{stem}.attn.indexer.wq_b"] = "float-quantized"
        schemes[f"{stem}.attn.indexer.weights_proj"] = None
    return {**schemes, "lm_head": None, "model.embed": None}


def matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern == name


def test_each_module_finds_its_scheme(
    config: dict[str, Any], expected: dict[str, str | None]
) -> None:
    for name, scheme in expected.items():
        groups = config["config_groups"].values()
        found = [g["format"] for g in groups if any(matches(t, name) for t in g["targets"])]
        ignored = any(matches(pattern, name) for pattern in config["ignore"])
        assert (None if ignored or not found else found[0]) == scheme, name


@pytest.mark.vllm
def test_vllm_finds_the_same_schemes(
    config: dict[str, Any], expected: dict[str, str | None]
) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    parsed = CompressedTensorsConfig.from_config(deepcopy(config))
    parsed.packed_modules_mapping = {
        "gate_up_proj": ["w1", "w3"],
        "fused_wqa_wkv": ["wq_a", "wkv"],
    }
    fused = {
        f"{LAYER}.attn.fused_wqa_wkv": "float-quantized",
        f"{LAYER}.ffn.shared_experts.gate_up_proj": expected[f"{LAYER}.ffn.shared_experts.w1"],
        "model.layers.0.attn.fused_wqa_wkv": "float-quantized",
        "model.layers.0.ffn.shared_experts.gate_up_proj": None,
    }
    for name, scheme in (expected | fused).items():
        found = parsed.get_scheme_dict(nn.Linear(1, 1), name)
        assert (found["format"] if found else None) == scheme, name


def test_adding_a_head_leaves_the_bases_config_as_it_was(experts: ExpertFormat) -> None:
    config = base_quantization_config()
    before = deepcopy(config)
    add_head(config, 4, experts, "bf16")
    assert config == before


def test_bundled_base_carries_the_config_of_a_base(tiny_model: Path) -> None:
    stored = json.loads((tiny_model / "base" / "config.json").read_text())
    assert stored["quantization_config"] == base_quantization_config()


def test_every_group_is_one_that_compressed_tensors_accepts(config: dict[str, Any]) -> None:
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.config_groups.keys() == config["config_groups"].keys()
    for name, group in config["config_groups"].items():
        assert parsed.config_groups[name].weights.num_bits == group["weights"]["num_bits"]
