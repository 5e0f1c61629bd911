"""What the plugin's CPU drafter does; the names of scales are for `engine/test_engines.py`."""

import pytest
import torch
from torch import Tensor
from vllm.models.deepseek_v4.common.ops import fused_mtp_input_rmsnorm as norms

from mtp_graft.vllm_plugin.cpu import drafter
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
