"""A scheduler that drafts as many tokens a step as a file says: one engine measures several k.

`step_time.py` gives vLLM a schedule of k by batch size, for which it captures CUDA graphs; this
replaces what the schedule would choose. The file is read before each step; change it while no
request runs.
"""

import os
from pathlib import Path
from typing import Any

from engines import CHOSEN_K
from vllm.v1.core.sched.async_scheduler import AsyncScheduler


class ChosenK(AsyncScheduler):
    """vLLM's scheduler, with k out of the file that CHOSEN_K names."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        k = int(Path(os.environ[CHOSEN_K]).read_text())
        self.dynamic_sd_lookup = [k] * len(self.dynamic_sd_lookup)
        return super().schedule(*args, **kwargs)
