"""DeepSeek-V4 on NVIDIA GPUs: vLLM's own target and MTP drafter, loaded strictly."""

from collections.abc import Iterable

from torch import Tensor
from vllm.config import VllmConfig
from vllm.models import deepseek_v4 as stock

from mtp_graft.vllm_plugin.cuda.recording import record_on_demand
from mtp_graft.vllm_plugin.strict_loading import load_base, load_head


class DeepseekV4ForCausalLM(stock.DeepseekV4ForCausalLM):
    """The target; unread checkpoint tensors and unwritten parameters are errors."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        record_on_demand(self, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base's tensors."""
        return load_base(self, weights, super().load_weights)


class DeepSeekV4MTP(stock.DeepSeekV4MTP):
    """The drafter; unread checkpoint tensors and unwritten parameters are errors."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the head's tensors."""
        return load_head(self, weights, super().load_weights)
