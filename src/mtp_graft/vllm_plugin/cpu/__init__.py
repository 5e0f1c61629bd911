"""DeepSeek-V4 on a CPU without AMX: the target and its MTP drafter for vLLM's registry."""

from mtp_graft.vllm_plugin.cpu.drafter import DeepSeekV4MTP
from mtp_graft.vllm_plugin.cpu.target import DeepseekV4ForCausalLM

__all__ = ["DeepSeekV4MTP", "DeepseekV4ForCausalLM"]
