"""The CPU's quantization config: which layer is decoded how, and what it then computes."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the layers are vLLM's: install the cpu extra")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM for another platform than the CPU", allow_module_level=True)

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    ReplicatedLinear,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config

from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.errors import GraftError
from mtp_graft.quant import fp8_block
from mtp_graft.vllm_plugin.cpu.dequantize import (
    DequantizeOnLoad,
    FP8BlockLinear,
    dequantize_on_load,
)
from mtp_graft.vllm_plugin.cpu.experts import BF16Experts, Int4Experts, MXFP4Experts
from mtp_graft.vllm_plugin.cpu.order_free import OrderFreeLinear
from quantized import tiny_quantization
from references import decode_fp8_blocks
from vllm_layers import one_rank_group, routed_experts

pytestmark = pytest.mark.vllm

LAYER = "model.layers.4"
FUSED = {"fused_wqa_wkv": ["wq_a", "wkv"], "gate_up_proj": ["w1", "w3"]}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank_group(tmp_path_factory.mktemp("group")):
        yield


def parsed(config: dict[str, Any] | None = None) -> CompressedTensorsConfig:
    config = tiny_quantization() if config is None else config
    result = CompressedTensorsConfig.from_config(copy.deepcopy(config))
    result.packed_modules_mapping = FUSED
    return result


def linear(config: CompressedTensorsConfig, name: str) -> ReplicatedLinear:
    return ReplicatedLinear(
        200,
        300,
        bias=False,
        return_bias=False,
        params_dtype=torch.bfloat16,
        quant_config=config,
        prefix=f"{LAYER}.{name}",
    )


# The config object


def test_an_unquantized_model_stays_so() -> None:
    assert dequantize_on_load(None) is None


def test_config_keeps_everything_it_knew() -> None:
    config = parsed()
    dequantizing = dequantize_on_load(config)
    assert type(dequantizing) is DequantizeOnLoad
    assert vars(dequantizing) == vars(config)
    assert dequantizing.get_name() == "compressed-tensors"
    assert type(config) is CompressedTensorsConfig, "the caller's object is not changed"


def test_applying_again_changes_nothing() -> None:
    dequantizing = dequantize_on_load(parsed())
    assert dequantize_on_load(dequantizing) is dequantizing


def test_another_quantization_method_is_refused() -> None:
    with pytest.raises(GraftError, match=r"quant_method is fp8; .*compressed-tensors"):
        dequantize_on_load(Fp8Config())


def test_config_survives_the_way_to_a_worker_process() -> None:
    dequantizing = dequantize_on_load(parsed())
    arrived = pickle.loads(pickle.dumps(dequantizing))
    assert type(arrived) is DequantizeOnLoad
    assert vars(arrived) == vars(dequantizing)


# Which layer gets which method


def test_linears_get_the_method_of_their_group() -> None:
    config = dequantize_on_load(parsed())
    assert type(linear(config, "attn.wq_b").quant_method) is FP8BlockLinear
    for name in ("ffn.shared_experts.down_proj", "attn.indexer.weights_proj", "e_proj"):
        assert type(linear(config, name).quant_method) is OrderFreeLinear


def test_heads_projections_are_fp8_where_the_config_says_so() -> None:
    with_head = add_head(tiny_quantization(), 4, "int4", "base")
    config = dequantize_on_load(parsed(with_head))
    assert type(linear(config, "e_proj").quant_method) is FP8BlockLinear
    assert type(linear(config, "h_proj").quant_method) is FP8BlockLinear


@pytest.mark.parametrize(
    ("head", "expected"),
    [("int4", Int4Experts), ("mxfp4", MXFP4Experts), ("bf16", BF16Experts)],
)
def test_experts_get_the_method_of_their_group(head: Any, expected: type) -> None:
    settings = add_head(tiny_quantization(), 4, head, "base")
    config = dequantize_on_load(parsed(settings))
    of_head = routed_experts(config, f"{LAYER}.ffn.experts", 2, 128, 128)
    assert type(of_head.quant_method) is expected
    of_base = routed_experts(config, "model.layers.3.ffn.experts", 2, 128, 128)
    assert type(of_base.quant_method) is Int4Experts
    assert of_base.quant_method.group_size == 128


def changed(group: str, **weights: Any) -> CompressedTensorsConfig:
    settings = copy.deepcopy(tiny_quantization())
    settings["config_groups"][group]["weights"] |= weights
    return dequantize_on_load(parsed(settings))


def test_other_linear_schemes_are_refused_by_name() -> None:
    config = changed("group_0", strategy="channel", block_structure=None)
    with pytest.raises(GraftError, match=r"layers\.4\.attn\.wkv: weights are 8-bit float by chan"):
        linear(config, "attn.wkv")
    config = changed("group_0", block_structure=[64, 64])
    with pytest.raises(GraftError, match=r"layers\.4\.attn\.wkv: weights are 8-bit float by block"):
        linear(config, "attn.wkv")


@pytest.mark.parametrize("weights", [{"num_bits": 8}, {"symmetric": False}])
def test_other_expert_schemes_are_refused_by_name(weights: dict[str, Any]) -> None:
    config = changed("group_1", **weights)
    with pytest.raises(GraftError, match=r"layers\.4\.ffn\.experts: weights are \d-bit int"):
        routed_experts(config, f"{LAYER}.ffn.experts", 2, 128, 128)


def test_an_expert_in_two_groups_is_refused() -> None:
    """As with an unanchored `re:.*e_proj`, which matches gate_proj and no other matrix."""
    settings = tiny_quantization()
    fp8 = {**settings["config_groups"]["group_0"], "targets": ["re:.*e_proj"]}
    settings["config_groups"] = {"first": fp8, **settings["config_groups"]}
    config = dequantize_on_load(parsed(settings))
    with pytest.raises(GraftError, match="match different quantization groups"):
        routed_experts(config, f"{LAYER}.ffn.experts", 2, 128, 128)


# A linear from its stored tensors to its output


def stored(outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return FP8 codes, BF16 block scales and the float64 weights they stand for."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight[:, :128] *= 64  # the blocks' scales have to differ to be told apart
    scale = fp8_block.block_scale(weight)
    codes = fp8_block.encode(weight, scale)
    return codes, scale, decode_fp8_blocks(codes, scale)


def check_output(layer: Any, weight: Tensor) -> None:
    """The layer multiplies by the weights in BF16; its result is within a rounding of BF16."""
    x = torch.randn(40, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    output = layer(x)
    found = output[0] if isinstance(output, tuple) else output
    expected = x.double() @ weight.bfloat16().double().T
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)


def test_fp8_linear_computes_what_its_stored_tensors_stand_for() -> None:
    layer = linear(dequantize_on_load(parsed()), "attn.wq_b")
    codes, scale, weight = stored(300, 200, seed=0)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "weight_scale"}
    layer.weight.weight_loader(layer.weight, codes)
    layer.weight_scale.weight_loader(layer.weight_scale, scale)
    layer.quant_method.process_weights_after_loading(layer)
    assert not hasattr(layer, "weight_scale")
    check_output(layer, weight)


def test_merged_fp8_linear_puts_each_part_where_it_belongs() -> None:
    layer = MergedColumnParallelLinear(
        256,
        [128, 384],
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=dequantize_on_load(parsed()),
        prefix=f"{LAYER}.attn.fused_wqa_wkv",
    )
    assert type(layer.quant_method) is FP8BlockLinear
    parts = [stored(outputs, 256, seed=outputs) for outputs in (128, 384)]
    for position, (codes, scale, _) in reversed(list(enumerate(parts))):
        layer.weight.weight_loader(layer.weight, codes, position)
        layer.weight_scale.weight_loader(layer.weight_scale, scale, position)
    layer.quant_method.process_weights_after_loading(layer)
    check_output(layer, torch.cat([exact for _, _, exact in parts]))
