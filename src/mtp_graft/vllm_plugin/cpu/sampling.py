"""Gaps: with a drafter, sampled tokens are noise, and top-k without top-p ends the engine.

The rejection sampler spreads temperature, top-k and top-p of each request to the request's drafts.
vLLM's stand-in for that Triton kernel fills an int64 copy of its output, which is dropped unless
the output is int64 itself: what is read is uninitialized memory. And a temperature of 0.8 would
become 0. Greedy requests beside sampled ones get another's top-k, too.

A step of prompts alone has no drafts, and vLLM's PyTorch for top-k takes the largest of no values.

Seen in 0.32 (`_expand_kernel_impl` of `vllm/utils/cpu_triton_utils.py`, `apply_top_k_only` of
`vllm/v1/sample/ops/topk_topp_sampler.py`), read in 0.33.
"""

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from mtp_graft.vllm_plugin.replacing import replace


def fill_gaps() -> None:
    """Let vLLM's rejection sampler use the two functions below."""
    replace(rejection_sampler, "expand_batch_to_tokens", expand)
    replace(rejection_sampler, "apply_top_k_top_p", cut)


def expand(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """Return [num_tokens] of the dtype of `x` [R]: `x[r]` for each token of request r.

    Request r owns tokens `cu_num_tokens[r - 1]` (0 for the first) to `cu_num_tokens[r]` of [R]. An
    entry that equals `replace_from` becomes `replace_to`.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)


def cut(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    """Return `logits` [T, V] with -inf outside of each token's top-k and top-p; T may be 0."""
    return apply_top_k_top_p(logits, k, p) if len(logits) else logits
