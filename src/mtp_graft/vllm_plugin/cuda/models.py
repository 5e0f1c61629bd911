"""vLLM's CUDA DeepSeek-V4 and its MTP drafter, loaded strictly."""

from collections.abc import Iterable

from torch import Tensor
from vllm.config import VllmConfig
from vllm.models import deepseek_v4 as stock

from mtp_graft.vllm_plugin.compressors import decode_compressors
from mtp_graft.vllm_plugin.cuda.recording import record_on_demand
from mtp_graft.vllm_plugin.strict_loading import load_strictly

Weights = Iterable[tuple[str, Tensor]]


class DeepseekV4ForCausalLM(stock.DeepseekV4ForCausalLM):
    """The target; unread checkpoint tensors and unwritten parameters are errors."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        record_on_demand(self, vllm_config)

    def load_weights(self, weights: Weights) -> set[str]:
        """Load the base's tensors; the head's (`mtp.*`) belong to the drafter."""
        base = ((name, tensor) for name, tensor in weights if not name.startswith("mtp."))
        return load_strictly(self, decode_compressors(base), super().load_weights)


class DeepSeekV4MTP(stock.DeepSeekV4MTP):
    """The drafter; unread checkpoint tensors and unwritten parameters are errors."""

    def load_weights(self, weights: Weights) -> set[str]:
        """Load `mtp.0.*`; embedding and LM head are the target's."""
        head = ((name, tensor) for name, tensor in weights if name.startswith("mtp."))
        shared = {
            name
            for name, _ in self.named_parameters()
            if name.endswith((".shared_head.head.weight", "embed_tokens.weight"))
        }
        return load_strictly(self, head, super().load_weights, shared)
