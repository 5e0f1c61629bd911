"""Real layers of vLLM, built without an engine: one rank, small sizes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
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
    quant_config: QuantizationConfig | None,
    prefix: str,
    num_experts: int,
    hidden: int,
    intermediate: int,
    limit: float | None = LIMIT,
) -> RoutedExperts:
    """Return the layer that holds a MoE's experts, its parameters not loaded yet."""
    one_rank = FusedMoEParallelConfig.make_no_parallel()
    with set_current_vllm_config(VllmConfig()):
        config = FusedMoEConfig(
            num_experts=num_experts,
            experts_per_token=2,
            hidden_dim=hidden,
            intermediate_size=intermediate,
            num_local_experts=num_experts,
            num_logical_experts=num_experts,
            activation=MoEActivation.SILU,
            device="cpu",
            routing_method=RoutingMethodType.Default,
            moe_parallel_config=one_rank,
            in_dtype=torch.bfloat16,
        )
        placement = ExpertMapManager(
            max_num_batched_tokens=64,
            top_k=2,
            global_num_experts=num_experts,
            num_redundant_experts=0,
            num_expert_group=None,
            moe_parallel_config=one_rank,
            placement_strategy="linear",
            enable_eplb=False,
        )
        return RoutedExperts(
            prefix, torch.bfloat16, config, quant_config, placement, swiglu_limit=limit
        )


def load_expert(layer: RoutedExperts, expert: int, matrix: str, part: str, value: Tensor) -> None:
    """Load one tensor (`matrix` w1, w2 or w3; `part` weight, weight_scale, ...) as vLLM does."""
    name = f"{'w2' if matrix == 'w2' else 'w13'}_{part}"
    parameter = getattr(layer, name)
    done = parameter.weight_loader(
        parameter, value, name, shard_id=matrix, expert_id=expert, return_success=True
    )
    assert done


@contextmanager
def one_rank_group(folder: Path) -> Iterator[None]:
    """Have a tensor parallel group of this process alone; vLLM's linears ask for its size."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder / 'rendezvous'}", 0, "gloo")
        initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()
