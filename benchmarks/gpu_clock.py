"""How long a GPU computes in a step, apart from how long the step takes.

A step of few layers takes the engine's own time, scheduling and launching, while the GPU waits. The
time in which at least one kernel ran grows with the layers alone. Kernels are PyTorch's profiler's,
those of replayed CUDA graphs among them.
"""

from collections.abc import Iterable
from typing import Any

Span = tuple[float, float]  # beginning and end


class GpuClock:
    """Profile a vLLM model runner's steps, from the constructor to `stop`."""

    def __init__(self, model_runner: Any) -> None:
        import torch

        self.runner, self.steps = model_runner, 0
        self.execute = model_runner.execute_model
        model_runner.execute_model = self._counting
        torch.cuda.synchronize()
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.profile.start()

    def _counting(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.steps += scheduler_output.total_num_scheduled_tokens > 0
        return self.execute(scheduler_output, *args, **kwargs)

    def stop(self) -> tuple[int, float]:
        """Return the number of steps, and the milliseconds in which the GPU computed."""
        import torch
        from torch.autograd import DeviceType

        torch.cuda.synchronize()
        self.profile.stop()
        self.runner.execute_model = self.execute
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in self.profile.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        return self.steps, covered(spans) / 1000


def covered(spans: Iterable[Span]) -> float:
    """Return the length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
