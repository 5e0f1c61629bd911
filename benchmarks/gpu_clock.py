"""How long a GPU computes in a step, apart from how long the step takes.

A step of few layers takes the engine's own time, scheduling and launching, while the GPU waits. The
time in which at least one kernel ran grows with the layers alone. Kernels are PyTorch's profiler's,
and it slows an engine down for good: what is to be timed otherwise comes first.
"""

from collections.abc import Iterable
from typing import Any

#: Steps at the beginning that are profiled and forgotten: the first kernels may get no times.
WARM_UP = 4
Span = tuple[float, float]  # beginning and end


class GpuClock:
    """Profile a vLLM model runner's steps, from the constructor to `stop`."""

    def __init__(self, model_runner: Any) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        self.runner, self.steps = model_runner, 0
        self.execute = model_runner.execute_model
        model_runner.execute_model = self._counting
        self.profile = profile(
            activities=[ProfilerActivity.CUDA],
            schedule=schedule(wait=0, warmup=WARM_UP, active=10_000, repeat=1),
        )
        self.profile.start()

    def _counting(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        if scheduler_output.total_num_scheduled_tokens > 0:
            if self.steps > 0:
                if self.steps == WARM_UP:  # no kernel of an earlier step is left
                    torch.cuda.synchronize()
                self.profile.step()
            self.steps += 1
        return self.execute(scheduler_output, *args, **kwargs)

    def stop(self) -> tuple[int, int, float]:
        """Return the numbers of steps and kernels, and the milliseconds in which the GPU computed.

        Raises ValueError if there were no steps after the warm-up, or no kernels in them.
        """
        import torch
        from torch.autograd import DeviceType

        torch.cuda.synchronize()
        self.profile.stop()
        self.runner.execute_model = self.execute
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in self.profile.events() or ()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        steps = self.steps - WARM_UP
        if steps < 1 or not spans:
            raise ValueError(f"the profiler saw {len(spans)} kernels in {max(steps, 0)} steps")
        return steps, len(spans), covered(spans) / 1000


def covered(spans: Iterable[Span]) -> float:
    """Return the length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
