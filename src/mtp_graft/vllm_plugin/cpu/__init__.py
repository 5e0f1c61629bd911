"""DeepSeek-V4 on a CPU: vLLM's own target with the gaps around it filled, and its MTP drafter."""

import dataclasses

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.models.deepseek_v4.cpu import model as stock

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.cpu import attention_metadata, dequantize, order_free, recording
from mtp_graft.vllm_plugin.cpu.drafter import DeepSeekV4MTP
from mtp_graft.vllm_plugin.strict_loading import StrictTarget

__all__ = ["DeepSeekV4MTP", "DeepseekV4ForCausalLM"]


class DeepseekV4ForCausalLM(StrictTarget, stock.DeepseekV4ForCausalLM):
    """vLLM's CPU DeepSeek-V4 that also loads compressed-tensors W4A16-FP8, strictly."""

    hf_to_vllm_mapper: WeightsMapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if not torch.cpu._is_avx512_supported():
            raise GraftError("this CPU has no AVX-512, which vLLM's DeepSeek-V4 needs on a CPU")
        attention_metadata.fill_gaps()
        vllm_config.quant_config = dequantize.dequantize_on_load(vllm_config.quant_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        order_free.free_from_order(self)
        recording.record_on_demand(self, vllm_config)
        # Gap: its patterns rename scales for DeepSeek's own FP8 layers, to `weight_scale_inv`.
        # Ours have `weight_scale`, as the checkpoint. Seen in 0.32, read in 0.33.
        self.hf_to_vllm_mapper = dataclasses.replace(self.hf_to_vllm_mapper, orig_to_new_regex={})
