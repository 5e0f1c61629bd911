"""What the benchmarks add to vLLM's workers: acceptance, a clock, rounding, layers that repeat.

vLLM imports this module in every worker, through `worker_extension_cls`, before it loads a model.

A checkpoint of random weights need not hold every layer: with the load format `repeat_layers`, the
last layer stored of either kind of attention also serves as all later layers of that kind. All
weights still go through vLLM's own loaders, one layer after the other, as from a whole checkpoint;
those that serve again come from the GPU, to which each is copied once.
"""

from collections.abc import Generator
from copy import copy
from functools import partial
from typing import Any

import torch
from gpu_clock import GpuClock
from layers import copies, layer_of
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

LOAD_FORMAT = "repeat_layers"


class WorkerExtension:
    """Methods for `LLM.collective_rpc`."""

    def set_acceptance_rate(self, rate: float) -> list[float]:
        """Accept each draft with probability `rate`, if all before it were accepted."""
        rates = self.model_runner.rejection_sampler.synthetic_conditional_rates  # type: ignore[attr-defined]
        with torch.inference_mode():  # it may be an inference tensor
            rates.fill_(rate)
        return rates.tolist()

    def start_gpu_clock(self) -> None:
        """Begin to count steps and to time the GPU in them."""
        self.gpu_clock = GpuClock(self.model_runner)  # type: ignore[attr-defined]

    def stop_gpu_clock(self) -> tuple[int, int, float]:
        """Return the steps, the kernels in them and the milliseconds in which the GPU computed."""
        return self.gpu_clock.stop()

    def round_as_two_ranks(self) -> list[str]:
        """Round each attention's and feed-forward's output as a sum over two ranks is rounded.

        Returns the names of the modules. An eager engine alone obeys: graphs are recorded before.
        """
        model = self.model_runner.model  # type: ignore[attr-defined]
        torch.manual_seed(0)
        modules = [(n, m) for n, m in model.named_modules() if n.endswith((".attn", ".ffn"))]
        for _, module in modules:
            module.register_forward_hook(lambda _module, _inputs, output: sum_of_parts(output))
        return [name for name, _ in modules]

    def round_inputs_of_fp8(self, power_of_two: bool = True) -> None:
        """Round the inputs of FP8 weights as a GPU does; for the plugin's CPU model."""
        from vllm import _custom_ops as ops

        from mtp_graft.vllm_plugin.cpu.dequantize import FP8BlockLinear

        apply, multiply = FP8BlockLinear.apply, ops.bmm_cpu
        rounded = partial(as_fp8, power_of_two=power_of_two)
        FP8BlockLinear.apply = lambda self, layer, x, *rest: apply(self, layer, rounded(x), *rest)
        # attention's wo_a, without its layer
        ops.bmm_cpu = lambda out, x, *rest: multiply(out, rounded(x), *rest)

    def attention_remedied(self) -> list[str]:
        """Return the methods that the plugin had to decorate, of `cuda/graph_breaks.py`."""
        from mtp_graft.vllm_plugin.cuda import graph_breaks

        return graph_breaks.remedied


def as_fp8(x: torch.Tensor, power_of_two: bool = True) -> torch.Tensor:
    """Round `x` [..., I] to FP8, each 128 inputs of a row with a scale, or the power above it."""
    groups = x.float().unflatten(-1, (-1, 128))
    absmax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10)
    scale = absmax / 448
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    rounded = (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2).to(x.dtype)


def sum_of_parts(whole: torch.Tensor) -> torch.Tensor:
    """Return two parts of `whole` [T, D], independent and of equal size, rounded and added."""
    half = whole.float() / 2
    apart = torch.randn_like(half) * half.square().mean(-1, keepdim=True).sqrt()
    return (half + apart).to(whole.dtype) + (half - apart).to(whole.dtype)


@register_model_loader(LOAD_FORMAT)
class RepeatingLoader(DefaultModelLoader):
    """vLLM's own loader, and stored layers under further names."""

    def __init__(self, load_config: Any) -> None:
        as_default = copy(load_config)  # the drafter's loader looks at the same config
        as_default.load_format = "auto"
        super().__init__(as_default)

    def get_all_weights(self, model_config: Any, model: Any) -> Generator[tuple[str, Any]]:
        stored = super().get_all_weights(model_config, model)
        num_layers = model_config.hf_config.num_hidden_layers
        device = next(model.parameters()).device
        for name, tensor in stored:
            yield name, tensor
            layer = layer_of(name)
            others = copies(layer, num_layers) if layer is not None else ()
            on_device = tensor.to(device) if others else tensor
            for other in others:
                yield name.replace(f"layers.{layer}.", f"layers.{other}.", 1), on_device
