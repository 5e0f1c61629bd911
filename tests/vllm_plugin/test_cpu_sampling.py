"""What a request asks for reaches each of its drafts; that tokens follow it is for the engine."""

import pytest
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from mtp_graft.vllm_plugin.cpu.drafter import cut, expand

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_each_draft_gets_what_its_request_asks_for(dtype: torch.dtype, index: torch.dtype) -> None:
    """One of the requests drafts nothing; 0 stands for another value."""
    asked, ends = torch.tensor([5, 0, 7, 3, 0]).to(dtype), torch.tensor([2, 3, 3, 6, 7]).to(index)
    found = expand(asked, ends, 7, replace_from=0, replace_to=1)
    assert found.dtype == dtype
    assert found.tolist() == [5, 5, 1, 3, 3, 3, 1]
    fractions = expand(asked / 2, ends, 7)
    assert fractions.tolist() == [2.5, 2.5, 0, 1.5, 1.5, 1.5, 0]


def test_a_step_of_prompts_alone_has_no_drafts_to_cut() -> None:
    logits, top_k = torch.randn(3, 8), torch.tensor([1, 2, 8], dtype=torch.int32)
    assert torch.equal(cut(logits.clone(), top_k, None), apply_top_k_top_p(logits, top_k, None))
    assert cut(logits[:0], top_k[:0], None).shape == (0, 8)
