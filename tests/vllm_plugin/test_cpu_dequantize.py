"""The CPU's quantization config: which layer is decoded how."""

import pickle
from typing import Any

import pytest
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.fp8 import Fp8Config

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.cpu import dequantize
from mtp_graft.vllm_plugin.cpu.dequantize import dequantize_on_load
from mtp_graft.vllm_plugin.cpu.order_free import OrderFreeLinear
from quantized import tiny_quantization
from vllm_plugin.layers import CompressedTensorsConfig, config_for, routed_experts

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]


def linear(config: Any, name: str) -> ReplicatedLinear:
    prefix = f"model.layers.4.{name}"
    return ReplicatedLinear(200, 300, bias=False, quant_config=config, prefix=prefix)


def test_a_config_keeps_what_it_knew_and_survives_the_way_to_a_worker() -> None:
    config = CompressedTensorsConfig.from_config(tiny_quantization())
    dequantizing = dequantize_on_load(config)
    assert dequantize_on_load(dequantizing) is dequantizing
    assert dequantize_on_load(None) is None
    assert type(config) is CompressedTensorsConfig, "the caller's object is not changed"
    arrived = pickle.loads(pickle.dumps(dequantizing))
    assert type(arrived) is dequantize.DequantizeOnLoad
    assert vars(arrived) == vars(dequantizing) == vars(config)
    with pytest.raises(GraftError, match=r"quant_method is fp8; .*compressed-tensors"):
        dequantize_on_load(Fp8Config())


@pytest.mark.parametrize(
    ("head", "stored"), [("int4", ("int4", 128)), ("mxfp4", ("mxfp4", 32)), ("bf16", ("plain", 1))]
)
def test_each_layer_gets_the_method_of_its_group(head: str, stored: tuple[str, int]) -> None:
    config = config_for(head)
    for name in ("attn.wq_b", "e_proj", "h_proj"):
        assert type(linear(config, name).quant_method) is dequantize.FP8BlockLinear
    for name in ("ffn.shared_experts.down_proj", "attn.indexer.weights_proj"):
        assert type(linear(config, name).quant_method) is OrderFreeLinear
    for layer, expected in ((4, stored), (3, ("int4", 128))):
        method = routed_experts(config, layer).quant_method
        assert (method.kind, method.group_size) == expected


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("group_0", {"block_structure": [64, 64]}, "8-bit float by block"),
        ("group_1", {"symmetric": False}, "4-bit int"),
    ],
)
def test_other_schemes_are_refused(group: str, change: dict[str, Any], message: str) -> None:
    settings = tiny_quantization()
    settings["config_groups"][group]["weights"] |= change
    config = dequantize_on_load(CompressedTensorsConfig.from_config(settings))
    with pytest.raises(GraftError, match=rf"layers\.4\.[a-z.]+: weights are {message}"):
        linear(config, "attn.wkv")
        routed_experts(config)


def test_an_expert_in_two_groups_is_refused() -> None:
    """As with an unanchored `re:.*e_proj`, which matches gate_proj and no other matrix."""
    settings = tiny_quantization()
    fp8 = {**settings["config_groups"]["group_0"], "targets": ["re:.*e_proj"]}
    settings["config_groups"] = {"first": fp8, **settings["config_groups"]}
    config = dequantize_on_load(CompressedTensorsConfig.from_config(settings))
    with pytest.raises(GraftError, match="match different quantization groups"):
        routed_experts(config)
