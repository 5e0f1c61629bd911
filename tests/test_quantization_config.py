"""Which scheme an engine finds for each module, by the names engines use."""

from copy import deepcopy
from typing import Any

import pytest
from torch import nn

from mtp_graft.checkpoint.quantization_config import (
    add_head,
    int4_group_size,
    read_quantization,
    scheme_of,
)
from mtp_graft.errors import GraftError
from mtp_graft.recipe import Linears, Variant
from quantized import tiny_quantization
from serving.flash import CONFIG

EXPERT_MATRICES = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
ATTENTION = ("fused_wqa_wkv", "wq_a", "wq_b", "wkv", "wo_a", "wo_b")
FP8, INT4 = "float-quantized", "pack-quantized"
EXPERT_FORMATS: dict[Variant, str | None] = {
    "gptq": INT4,
    "mxfp4": "mxfp4-pack-quantized",
    "bf16": None,
}
FUSED = {
    "gate_up_proj": ["w1", "w3"],
    "fused_wqa_wkv": ["wq_a", "wkv"],
    "fused_wkv_wgate": ["wkv", "wgate"],
}


def expected_formats(variant: Variant, linears: Linears) -> dict[str, str | None]:
    """Return module -> stored format, None for unquantized, with the head as layer 4."""
    shared = [f"ffn.shared_experts.{m}" for m in (*EXPERT_MATRICES, "gate_up_proj")]
    head = dict.fromkeys(("e_proj", "h_proj"), None if linears == "bf16" else FP8)
    head |= dict.fromkeys(shared, FP8 if linears == "fp8" else None)
    head |= {f"ffn.experts.63.{m}": EXPERT_FORMATS[variant] for m in EXPERT_MATRICES}
    base = {f"ffn.experts.7.{m}": INT4 for m in EXPERT_MATRICES} | dict.fromkeys(shared)
    base |= {"attn.compressor.wkv": None, "attn.indexer.wq_b": FP8, "lm_head": None}
    both = {f"attn.{name}": FP8 for name in ATTENTION} | {"ffn.gate": None, "enorm": None}
    layers = dict.fromkeys((0, 14, 40, 44), base) | {4: head}  # some contain the head's number
    return {
        f"model.layers.{layer}.{name}": scheme
        for layer, modules in layers.items()
        for name, scheme in (modules | both).items()
    }


@pytest.mark.parametrize("variant", EXPERT_FORMATS)
@pytest.mark.parametrize("linears", ["fp8", "base", "bf16"])
def test_each_module_finds_its_scheme_and_the_bases_section_stays(
    variant: Variant, linears: Linears
) -> None:
    base = tiny_quantization()
    config = add_head(base, 4, variant, linears)
    for name, scheme in expected_formats(variant, linears).items():
        found = scheme_of(config, name)
        assert (found and found["format"]) == scheme, name
    assert base == tiny_quantization()


WRITTEN_BY_OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "fused": ({"group_0": [r"re:.*\.attn\.(fused_wqa_wkv|wq_b|wo_a|wo_b)$"]}, []),
    "class": ({"group_0": ["Linear"]}, ["re:.*shared_experts.*"]),
    "full names": ({"group_0": ["layers.1.attn.wq_a", "model.layers.1.attn.wkv"]}, []),
    "mapped": ({"group_0": ["layers.1.ffn.shared_experts.w2"]}, ["layers.1.attn.wq_b"]),
    "twice": ({"group_1": [r"re:.*\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)$"]}, []),
    "in part": ({"group_0": ["re:.*wq_a$"]}, []),
}


@pytest.mark.vllm
@pytest.mark.parametrize("case", ["ours", "published", *WRITTEN_BY_OTHERS])
def test_vllm_finds_the_same_schemes(case: str) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from vllm.models.deepseek_v4.cpu.model import _make_deepseek_v4_weights_mapper

    config = add_head(tiny_quantization(), 4, "gptq", "fp8")
    if case == "published":
        config = add_head(CONFIG["quantization_config"], 4, "mxfp4", "base")
    elif case != "ours":
        targets, ignore = WRITTEN_BY_OTHERS[case]
        config = tiny_quantization()
        for key, patterns in targets.items():
            config["config_groups"][key]["targets"] = patterns
        config["ignore"] += ignore
    parsed = CompressedTensorsConfig.from_config(deepcopy(config))
    parsed.apply_vllm_mapper(_make_deepseek_v4_weights_mapper("bf16"))
    parsed.packed_modules_mapping = FUSED
    parts = tuple(f".{part}" for fused in FUSED.values() for part in fused)
    modules = [n for n in expected_formats("gptq", "fp8") if n.startswith("model.layers.4.")]
    for name in (n.replace("layers.4", f"layers.{layer}") for n in modules for layer in (0, 1, 4)):
        if not name.endswith((*parts, ".w2")) or ".experts." in name:  # vLLM asks for these
            theirs = parsed.get_scheme_dict(nn.Linear(1, 1), name)
            ours = scheme_of(config, name)
            assert (ours and ours["format"]) == (theirs and theirs["format"]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(ignore=["re:*shared*"]), r"ignore\.0: .*no regular expression"),
        (lambda c: c.update(quant_method="fp8"), "quant_method: input should be"),
    ],
)
def test_a_section_that_vllm_cannot_read_is_refused(change: Any, message: str) -> None:
    config = tiny_quantization()
    change(config)
    with pytest.raises(GraftError, match=message):
        read_quantization({"quantization_config": config})


def test_a_module_that_is_ignored_in_part_is_refused() -> None:
    config = tiny_quantization() | {"ignore": ["re:.*wq_a$"]}
    with pytest.raises(GraftError, match=r"a part of .*fused_wqa_wkv"):
        scheme_of(config, "model.layers.0.attn.fused_wqa_wkv")


def test_what_may_be_null_may_be_null() -> None:
    config = tiny_quantization() | {"ignore": None, "format": "pack-quantized"}
    config["config_groups"]["group_1"] |= {"format": None, "input_activations": None}
    found = scheme_of(add_head(config, 4, "gptq", "base"), "model.layers.4.ffn.experts.0.w1")
    assert found == config["config_groups"]["group_1"]


def test_the_int4_group_size_has_to_be_one() -> None:
    config = tiny_quantization()
    assert int4_group_size(config) == 128
    del config["config_groups"]["group_1"]
    with pytest.raises(GraftError, match="has 0 INT4 group sizes"):
        int4_group_size(config)
