"""The target model on a CPU: vLLM's own, with the gaps around it filled."""

from collections.abc import Iterable

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.models.deepseek_v4.cpu import model as stock

from mtp_graft.vllm_plugin import tile_scheduler, triton_kernels
from mtp_graft.vllm_plugin.compressors import decode_compressors
from mtp_graft.vllm_plugin.cpu import sampling
from mtp_graft.vllm_plugin.cpu.dequantize import dequantize_on_load
from mtp_graft.vllm_plugin.cpu.hyper_connections import compute_rowwise
from mtp_graft.vllm_plugin.cpu.indexer import flatten_drafts
from mtp_graft.vllm_plugin.cpu.order_free import free_from_order
from mtp_graft.vllm_plugin.cpu.output_projection import project_rowwise
from mtp_graft.vllm_plugin.cpu.recording import record_on_demand
from mtp_graft.vllm_plugin.scale_names import keep_weight_scale
from mtp_graft.vllm_plugin.strict_loading import load_strictly


class DeepseekV4ForCausalLM(stock.DeepseekV4ForCausalLM):
    """vLLM's CPU DeepSeek-V4 that also loads compressed-tensors W4A16-FP8, strictly."""

    hf_to_vllm_mapper: WeightsMapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        triton_kernels.register()
        tile_scheduler.apply()
        sampling.apply()
        flatten_drafts()
        vllm_config.quant_config = dequantize_on_load(vllm_config.quant_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        compute_rowwise(self)
        project_rowwise(self)
        free_from_order(self)
        record_on_demand(self, vllm_config)
        self.hf_to_vllm_mapper = keep_weight_scale(self.hf_to_vllm_mapper)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base's tensors; the head's (`mtp.*`) belong to the drafter."""
        base = ((name, tensor) for name, tensor in weights if not name.startswith("mtp."))
        return load_strictly(self, decode_compressors(base), super().load_weights)
