"""Gap, until vLLM 0.27: the output projection reads a name that compressed-tensors has not.

It takes the scale of `wo_a` as `weight_scale_inv`, the name in DeepSeek's own FP8 layers, where a
compressed-tensors layer has `weight_scale`. Later versions take either.
"""

from collections.abc import Callable
from types import FunctionType, ModuleType

from torch import nn


def apply(model: nn.Module) -> None:
    """Give every `wo_a` of `model` its scale under the other name too, where vLLM needs that."""
    from vllm.models.deepseek_v4.nvidia.ops import o_proj

    if not reads_weight_scale(o_proj):
        alias_scale_of_wo_a(model)


def reads_weight_scale(module: ModuleType) -> bool:
    """Return whether any function of `module` reads an attribute `weight_scale`."""
    functions = [value for value in vars(module).values() if isinstance(value, FunctionType)]
    own = [function for function in functions if function.__module__ == module.__name__]
    return any("weight_scale" in function.__code__.co_names for function in own)


def alias_scale_of_wo_a(model: nn.Module) -> None:
    """Name the scale of every `wo_a` `weight_scale_inv` as well, once the layer is processed.

    Earlier the name must not exist: vLLM's kernels take it as a sign of the other layout.
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
