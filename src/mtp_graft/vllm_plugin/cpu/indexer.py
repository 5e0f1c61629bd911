"""Gap: with k = 1 the CPU indexer refuses contexts beyond 2,051 tokens.

vLLM hands two query tokens a request to kernels that take them "natively", and believes so of the
CPU. Its CPU indexer takes one: past `index_topk` compressed entries, where it really has to
choose, it stops at an assertion. With k = 2 and 3 the query tokens are flattened to one a row,
which the CPU's kernels do take, so k = 1 is flattened as well.
"""

import functools
from typing import Any

from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUIndexerMetadataBuilder as Builder


def flatten_drafts() -> None:
    """Make the CPU indexer's metadata builder flatten for every k > 0; safe to call twice."""
    original = Builder.__init__
    if getattr(original, "flattens_drafts", False):
        return

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.use_flattening = self.num_speculative_tokens > 0

    init.flattens_drafts = True  # type: ignore[attr-defined]
    Builder.__init__ = init
