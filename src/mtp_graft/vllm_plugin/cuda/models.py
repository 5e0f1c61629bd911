"""vLLM's CUDA DeepSeek-V4 and its MTP drafter, with what they lack for W4A16-FP8 checkpoints."""

from collections.abc import Iterable

from torch import Tensor, nn
from vllm.models import deepseek_v4 as stock

from mtp_graft.vllm_plugin.strict_loading import load_strictly

Weights = Iterable[tuple[str, Tensor]]


class DeepseekV4ForCausalLM(stock.DeepseekV4ForCausalLM):  # type: ignore[misc]
    """The target; unread checkpoint tensors and unwritten parameters are errors."""

    def load_weights(self, weights: Weights) -> set[str]:
        """Load the base's tensors; the head's (`mtp.*`) belong to the drafter."""
        alias_scale_of_wo_a(self)
        base = ((name, tensor) for name, tensor in weights if not name.startswith("mtp."))
        return load_strictly(self, base, super().load_weights)


class DeepSeekV4MTP(stock.DeepSeekV4MTP):  # type: ignore[misc]
    """The drafter; unread checkpoint tensors and unwritten parameters are errors."""

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
    """Let `wo_a.weight_scale_inv` answer with `wo_a.weight_scale`.

    Gap, until vLLM 0.32: the output projection reads the name of DeepSeek's own FP8 layers, while
    a compressed-tensors layer has `weight_scale`.
    """
    for name, module in model.named_modules():
        if name.endswith(".wo_a") and hasattr(module, "weight_scale"):
            aliased = property(lambda self: self.weight_scale)
            module.__class__ = type(
                module.__class__.__name__, (module.__class__,), {"weight_scale_inv": aliased}
            )
