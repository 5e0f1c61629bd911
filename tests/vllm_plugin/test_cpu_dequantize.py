"""The CPU's quantization config: which layer is decoded how, and what it then computes."""

import copy
import pickle
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config

from mtp_graft.errors import GraftError
from mtp_graft.quant import fp8_block
from mtp_graft.vllm_plugin.cpu.dequantize import (
    DequantizeOnLoad,
    FP8BlockLinear,
    dequantize_on_load,
)
from mtp_graft.vllm_plugin.cpu.order_free import OrderFreeLinear
from quantized import tiny_quantization
from references import decode_fp8_blocks
from vllm_plugin.layers import config_for, routed_experts

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]

LAYER = "model.layers.4"


def options_of(config: Any, name: str) -> dict[str, Any]:
    options = {"bias": False, "return_bias": False, "params_dtype": torch.bfloat16}
    return {**options, "quant_config": config, "prefix": f"{LAYER}.{name}"}


def linear(config: Any, name: str) -> ReplicatedLinear:
    return ReplicatedLinear(200, 300, **options_of(config, name))


def experts(config: Any, layer: str = LAYER) -> Any:
    return routed_experts(config, f"{layer}.ffn.experts", 2, 128, 128)


def test_a_config_keeps_what_it_knew_and_survives_the_way_to_a_worker() -> None:
    config = CompressedTensorsConfig.from_config(tiny_quantization())
    dequantizing = dequantize_on_load(config)
    assert dequantize_on_load(dequantizing) is dequantizing
    assert dequantize_on_load(None) is None
    assert type(config) is CompressedTensorsConfig, "the caller's object is not changed"
    arrived = pickle.loads(pickle.dumps(dequantizing))
    assert type(arrived) is DequantizeOnLoad
    assert vars(arrived) == vars(dequantizing) == vars(config)
    with pytest.raises(GraftError, match=r"quant_method is fp8; .*compressed-tensors"):
        dequantize_on_load(Fp8Config())


@pytest.mark.parametrize(
    ("head", "stored"),
    [("int4", (128, torch.int32)), ("mxfp4", (32, torch.uint8)), ("bf16", None)],
)
def test_each_layer_gets_the_method_of_its_group(head: str, stored: Any) -> None:
    config = config_for(head)
    for name in ("attn.wq_b", "e_proj", "h_proj"):
        assert type(linear(config, name).quant_method) is FP8BlockLinear
    for name in ("ffn.shared_experts.down_proj", "attn.indexer.weights_proj"):
        assert type(linear(config, name).quant_method) is OrderFreeLinear
    for layer, expected in ((LAYER, stored), ("model.layers.3", (128, torch.int32))):
        packed = experts(config, layer).quant_method.packed
        assert (packed and (packed.group_size, packed.codes_dtype)) == expected


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("group_0", {"strategy": "channel", "block_structure": None}, "8-bit float by channel"),
        ("group_0", {"block_structure": [64, 64]}, "8-bit float by block"),
        ("group_1", {"num_bits": 8}, "8-bit int"),
        ("group_1", {"symmetric": False}, "4-bit int"),
    ],
)
def test_other_schemes_are_refused_by_the_layers_name(
    group: str, change: dict[str, Any], message: str
) -> None:
    settings = copy.deepcopy(tiny_quantization())
    settings["config_groups"][group]["weights"] |= change
    config = dequantize_on_load(CompressedTensorsConfig.from_config(settings))
    with pytest.raises(GraftError, match=rf"layers\.4\.[a-z.]+: weights are {message}"):
        linear(config, "attn.wkv")
        experts(config)


def test_an_expert_in_two_groups_is_refused() -> None:
    """As with an unanchored `re:.*e_proj`, which matches gate_proj and no other matrix."""
    settings = tiny_quantization()
    fp8 = {**settings["config_groups"]["group_0"], "targets": ["re:.*e_proj"]}
    settings["config_groups"] = {"first": fp8, **settings["config_groups"]}
    config = dequantize_on_load(CompressedTensorsConfig.from_config(settings))
    with pytest.raises(GraftError, match="match different quantization groups"):
        experts(config)


@pytest.mark.parametrize("parts", [[300], [128, 384]], ids=["alone", "merged"])
def test_fp8_linears_compute_what_their_stored_tensors_stand_for(parts: list[int]) -> None:
    config, inputs = config_for("int4"), 200
    if len(parts) > 1:
        options = options_of(config, "attn.fused_wqa_wkv")
        layer = MergedColumnParallelLinear(inputs, parts, **options)
    else:
        layer = linear(config, "attn.wq_b")
    exact = []
    for position, outputs in enumerate(parts):
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs))
        weight[:, :128] *= 64  # the blocks' scales have to differ to be told apart
        scale = fp8_block.block_scale(weight)
        codes = fp8_block.encode(weight, scale)
        exact.append(decode_fp8_blocks(codes, scale))
        place = [position] if len(parts) > 1 else []
        layer.weight.weight_loader(layer.weight, codes, *place)
        layer.weight_scale.weight_loader(layer.weight_scale, scale, *place)
    layer.quant_method.process_weights_after_loading(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    x = torch.randn(40, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.double() @ torch.cat(exact).bfloat16().double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-8, atol=1e-4)
