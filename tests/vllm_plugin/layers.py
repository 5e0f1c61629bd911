"""Real layers of vLLM, built without an engine: one rank, small sizes."""

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.vllm_plugin.cpu.dequantize import dequantize_on_load
from quantized import tiny_quantization

LIMIT = 10.0


def config_for(head: Any) -> CompressedTensorsConfig:
    """Return the config of a spliced checkpoint of four layers, as the plugin reads it."""
    settings = add_head(tiny_quantization(), 4, head, "base")
    config = dequantize_on_load(CompressedTensorsConfig.from_config(settings))
    config.packed_modules_mapping = {"fused_wqa_wkv": ["wq_a", "wkv"], "gate_up_proj": ["w1", "w3"]}
    return config


def routed_experts(
    config: Any, layer: int = 4, num_experts: int = 2, hidden_size: int = 128, size: int = 128,
    limit: float | None = LIMIT,
) -> RoutedExperts:  # fmt: skip
    """Return the layer that holds a MoE's experts, two a token, its parameters not loaded yet."""
    how = {"prefix": f"model.layers.{layer}.ffn.experts", "swiglu_limit": limit}
    how |= {"params_dtype": torch.bfloat16, "quant_config": config}
    with set_current_vllm_config(VllmConfig()):  # which knows a layer of each name only once
        moe = FusedMoEFactory(num_experts, 2, hidden_size, size, **how)
    return moe.routed_experts


def load_expert(layer: RoutedExperts, expert: int, matrix: str, part: str, value: Tensor) -> None:
    """Load one tensor (`matrix` w1, w2 or w3; `part` weight, weight_scale, ...) as vLLM does."""
    name = f"{'w2' if matrix == 'w2' else 'w13'}_{part}"
    parameter = getattr(layer, name)
    where = {"shard_id": matrix, "expert_id": expert, "return_success": True}
    assert parameter.weight_loader(parameter, value, name, **where)
