"""The plugin's CPU drafter: what it normalizes, and what a request asks for reaches each draft."""

import pytest
import torch
from torch import Tensor
from vllm.models.deepseek_v4.common.ops import fused_mtp_input_rmsnorm as norms
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from mtp_graft.vllm_plugin.cpu import drafter
from mtp_graft.vllm_plugin.cpu.drafter import cut, expand
from mtp_graft.vllm_plugin.replacing import replace

pytestmark = pytest.mark.vllm


def test_the_drafters_inputs_and_output_are_normalized_row_by_row() -> None:
    """Called as vLLM's drafter calls them; the embedding of position 0 counts as zero."""
    replace(norms.FusedMTPInputRMSNormKernel, "__call__", drafter.norm_inputs)
    replace(norms.MTPSharedHeadRMSNormKernel, "__call__", drafter.norm_output)
    generator = torch.Generator().manual_seed(0)
    embeds, weight, *streams = torch.randn(6, 5, 256, generator=generator).bfloat16()
    stacked, positions = torch.stack(streams, dim=1), torch.tensor([0, 7, 0, 3, 1])

    def expected(x: Tensor, row: int) -> Tensor:
        exact = x.double()
        scale = (exact.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (exact * scale * weight[row].double()).bfloat16()

    arguments = (embeds, positions, stacked, weight[0], weight[1], 1e-6, 4)
    found_embeds, found_streams = norms._FUSED_MTP_INPUT_RMSNORM_KERNEL(*arguments)
    unseen = positions.unsqueeze(-1) == 0
    torch.testing.assert_close(found_embeds, expected(embeds, 0).masked_fill(unseen, 0))
    torch.testing.assert_close(found_streams, expected(stacked, 1))
    output = norms._MTP_SHARED_HEAD_RMSNORM_KERNEL(embeds, weight[2], 1e-6)
    torch.testing.assert_close(output, expected(embeds, 2))


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
