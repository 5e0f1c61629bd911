"""DeepSeek-V4 on NVIDIA GPUs: vLLM's own target and drafter, loaded strictly."""

from mtp_graft.vllm_plugin.cuda.models import DeepseekV4ForCausalLM, DeepSeekV4MTP

__all__ = ["DeepSeekV4MTP", "DeepseekV4ForCausalLM"]
