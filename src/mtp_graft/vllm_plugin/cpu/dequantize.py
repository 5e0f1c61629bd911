"""Gap: FP8 blocks and INT4 experts load on a CPU only with AMX; MXFP4 experts select a GPU kernel.

One place serves all three: the checkpoint's quantized tensors are loaded as they are and decoded
once, after loading: linears to the model's dtype, experts to float32.
"""

import copy
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig as Config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
from vllm.model_executor.layers.quantization.utils import fp8_utils
from vllm.model_executor.parameter import BlockQuantScaleParameter

from mtp_graft.errors import GraftError
from mtp_graft.quant import FP8_BLOCK, MXFP4_GROUP, decode_fp8
from mtp_graft.vllm_plugin.cpu.experts import StoredExperts
from mtp_graft.vllm_plugin.cpu.order_free import OrderFreeLinear


class DequantizeOnLoad(compressed_tensors.CompressedTensorsConfig):
    """A compressed-tensors config whose layers decode their weights after loading."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how to load and run `layer`; GraftError for a scheme that is not W4A16-FP8's."""
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        if (weights := (self.get_scheme_dict(layer, prefix) or {}).get("weights")) is None:
            return OrderFreeLinear()
        if weights.block_structure == [FP8_BLOCK, FP8_BLOCK]:
            return FP8BlockLinear()
        raise _unsupported(prefix, weights)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase:
        matrices = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        groups = [self.get_scheme_dict(layer, f"{prefix}.0.{matrix}") or {} for matrix in matrices]
        schemes = [group.get("weights") for group in groups]
        if schemes.count(schemes[0]) != len(schemes):
            found = "w1, w2 and w3 match different quantization groups; expected one"
            raise GraftError(f"{prefix}: {found}: check the config's target patterns")
        if (weights := schemes[0]) is None:
            return StoredExperts(layer.moe_config, "plain")
        if weights.type == QuantizationType.INT and weights.num_bits == 4 and weights.symmetric:
            return StoredExperts(layer.moe_config, "int4", weights.group_size)
        if self._is_mxfp4(weights):
            return StoredExperts(layer.moe_config, "mxfp4", MXFP4_GROUP)
        raise _unsupported(prefix, weights)


def dequantize_on_load(config: Config | None) -> Config | None:
    """Return `config` as a `DequantizeOnLoad`; an unquantized model's None stays None."""
    if config is None or isinstance(config, DequantizeOnLoad):
        return config
    if type(config) is not compressed_tensors.CompressedTensorsConfig:
        supported = "on a CPU only compressed-tensors checkpoints (W4A16-FP8) are supported"
        raise GraftError(f"config.json: quant_method is {config.get_name()}; {supported}")
    dequantizing = copy.copy(config)
    dequantizing.__class__ = DequantizeOnLoad
    return dequantizing


def _unsupported(name: str, weights: QuantizationArgs) -> GraftError:
    found = f"weights are {weights.num_bits}-bit {weights.type} by {weights.strategy}"
    supported = "FP8 in 128x128 blocks, symmetric INT4 groups and MXFP4 experts"
    return GraftError(f"{name}: {found}; supported on a CPU are {supported}")


class FP8BlockLinear(OrderFreeLinear):
    """A linear stored as FP8 in 128 x 128 blocks."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Register `weight` (FP8 [O, I]) and `weight_scale` ([O/128, I/128]) for loading."""
        layer.orig_dtype = params_dtype
        layer.weight_block_size = block = [FP8_BLOCK, FP8_BLOCK]  # for the merged-column loader
        inputs, outputs = input_size_per_partition, output_partition_sizes
        fp8_utils.validate_fp8_block_shape(layer, input_size, output_size, inputs, outputs, block)
        loader = attributes["weight_loader"]
        layer.weight = fp8_utils.create_fp8_weight_parameter(sum(outputs), inputs, loader)
        layer.weight_scale = fp8_utils.create_fp8_scale_parameter(
            BlockQuantScaleParameter, outputs, inputs, block, loader
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the stored pair by one weight in the model's dtype."""
        weight = decode_fp8(layer.weight.data, layer.weight_scale.data)
        del layer.weight_scale
        layer.weight = nn.Parameter(weight.to(layer.orig_dtype), requires_grad=False)
        super().process_weights_after_loading(layer)
