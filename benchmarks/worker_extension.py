"""What the benchmarks add to vLLM's processes, which import this module before they load a model.

A checkpoint of random weights need not hold every layer: with the load format `repeat_layers`, the
last layer stored of either kind of attention also serves as all later layers of that kind. All
weights still go through vLLM's own loaders, one layer after the other; those that serve again come
from the GPU, to which each is copied once.
"""

import os
from collections.abc import Generator
from copy import copy
from pathlib import Path
from typing import Any

from engines import CHOSEN_K, copies, layer_of
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1.core.sched.async_scheduler import AsyncScheduler


class WorkerExtension:
    """Nothing but the import is wanted."""


class ChosenK(AsyncScheduler):
    """vLLM's scheduler, with k out of the file that CHOSEN_K names: one engine measures several.

    It replaces what the schedule of k by batch size would choose, for which vLLM captured CUDA
    graphs. The file is read before each step; change it while no request runs.
    """

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        k = int(Path(os.environ[CHOSEN_K]).read_text())
        self.dynamic_sd_lookup = [k] * len(self.dynamic_sd_lookup)
        return super().schedule(*args, **kwargs)


@register_model_loader("repeat_layers")
class RepeatingLoader(DefaultModelLoader):
    """vLLM's own loader, and stored layers under further names."""

    def __init__(self, load_config: Any) -> None:
        as_default = copy(load_config)  # the drafter's loader looks at the same config
        as_default.load_format = "auto"
        super().__init__(as_default)

    def get_all_weights(self, model_config: Any, model: Any) -> Generator[tuple[str, Any]]:
        num_layers = model_config.hf_config.num_hidden_layers
        device = next(model.parameters()).device
        for name, tensor in super().get_all_weights(model_config, model):
            yield name, tensor
            layer = layer_of(name)
            others = copies(layer, num_layers) if layer is not None else ()
            on_device = tensor.to(device) if others else tensor
            for other in others:
                yield name.replace(f"layers.{layer}.", f"layers.{other}.", 1), on_device
