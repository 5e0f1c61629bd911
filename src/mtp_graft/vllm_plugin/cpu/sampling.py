"""Gap: with a drafter, a sampled request's temperature, top-k and top-p are uninitialized memory.

The rejection sampler spreads what was asked for each request to the request's drafts. vLLM's
stand-in for that Triton kernel fills an int64 copy of its output, which is dropped unless the
output is int64 itself, and would truncate a temperature of 0.8 to 0. So sampled tokens are noise,
and greedy requests beside them are filtered with another's top-k. Seen in 0.32
(`_expand_kernel_impl` of `vllm/utils/cpu_triton_utils.py`).
"""

import torch
from torch import Tensor


def apply() -> None:
    """Let vLLM's rejection sampler spread its settings with `expand`; safe to call twice."""
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand


def expand(
    x: Tensor,  # [R], any dtype
    cu_num_tokens: Tensor,  # [R] i32 or i64, not decreasing
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> Tensor:
    """Return [num_tokens] of x's dtype: `x[r]` for each token of request r, one after the other.

    Request r owns tokens `cu_num_tokens[r - 1]` (0 for the first) to `cu_num_tokens[r]`. An entry
    that equals `replace_from` becomes `replace_to`.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)
