"""vLLM's CUDA DeepSeek-V4 and its MTP drafter, with what they lack for W4A16-FP8 checkpoints."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.models import deepseek_v4 as stock

from mtp_graft.vllm_plugin import draft_steps
from mtp_graft.vllm_plugin.compressors import decode_compressors
from mtp_graft.vllm_plugin.cuda import graph_breaks, hyper_connections, rope
from mtp_graft.vllm_plugin.recording import record_on_demand
from mtp_graft.vllm_plugin.strict_loading import load_strictly

Weights = Iterable[tuple[str, Tensor]]

#: Gap: without it no quantization group matches the fused modules. Upstream from vLLM 0.29 for the
#: target, with these entries, and in no version for the drafter (0.26 to 0.33 read).
FUSED = {
    "gate_up_proj": ["w1", "w3"],
    "fused_wqa_wkv": ["wq_a", "wkv"],
    "fused_wkv_wgate": ["wkv", "wgate"],
}


class DeepseekV4ForCausalLM(stock.DeepseekV4ForCausalLM):
    """The target; unread checkpoint tensors and unwritten parameters are errors."""

    packed_modules_mapping = FUSED

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        graph_breaks.apply()
        rope.apply()
        hyper_connections.apply(vllm_config.model_config.hf_config.hidden_size)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        record_on_demand(self, vllm_config)

    def load_weights(self, weights: Weights) -> set[str]:
        """Load the base's tensors; the head's (`mtp.*`) belong to the drafter."""
        alias_scale_of_wo_a(self)
        base = ((name, tensor) for name, tensor in weights if not name.startswith("mtp."))
        return load_strictly(self, decode_compressors(base), super().load_weights)


class DeepSeekV4MTP(stock.DeepSeekV4MTP):
    """The drafter; unread checkpoint tensors and unwritten parameters are errors."""

    packed_modules_mapping = FUSED

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        draft_steps.apply()
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Weights) -> set[str]:
        """Load `mtp.0.*`; embedding and LM head are the target's."""
        alias_scale_of_wo_a(self)
        head = ((name, tensor) for name, tensor in weights if name.startswith("mtp."))
        shared = {
            name
            for name, _ in self.named_parameters()
            if name.endswith((".shared_head.head.weight", "embed_tokens.weight"))
        }
        return load_strictly(self, head, super().load_weights, shared)


def alias_scale_of_wo_a(model: nn.Module) -> None:
    """Give every `wo_a` its scale under the name `weight_scale_inv` too, once it is processed.

    Gap, until vLLM 0.27: the output projection reads the name of DeepSeek's own FP8 layers, while
    a compressed-tensors layer has `weight_scale`. Earlier the name must not exist: vLLM's kernels
    take it as a sign of the other layout.
    """
    for name, module in model.named_modules():
        if name.endswith(".wo_a") and hasattr(module, "weight_scale"):
            method = module.quant_method
            method.process_weights_after_loading = _then_alias(method.process_weights_after_loading)


def _then_alias(process: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    def process_and_alias(layer: nn.Module) -> None:
        process(layer)
        layer.weight_scale_inv = layer.weight_scale

    return process_and_alias
