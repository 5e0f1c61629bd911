"""What the plugin's CPU target and drafter do to vLLM's own models."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vllm.models.deepseek_v4.common.ops import fused_mtp_input_rmsnorm as norms
from vllm.models.deepseek_v4.cpu.model import (
    DeepseekV4ForCausalLM,
    _make_deepseek_v4_weights_mapper,
)

from mtp_graft.vllm_plugin.cpu import drafter
from mtp_graft.vllm_plugin.cpu.target import keep_weight_scale
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


@pytest.mark.parametrize("expert_dtype", ["fp4", "int4", "fp8"])
def test_scales_keep_their_names_and_all_others_are_mapped_as_before(
    expert_dtype: str, tiny_model: Path
) -> None:
    stock = _make_deepseek_v4_weights_mapper(expert_dtype)
    before = dataclasses.replace(stock)
    kept = keep_weight_scale(stock)
    assert stock == before
    index = json.loads((tiny_model / "base" / "model.safetensors.index.json").read_text())
    names = [*index["weight_map"], "mtp.0.e_proj.weight", "layers.0.attn.wq_a.input_scale"]
    for name in names:
        stem, is_scale, _ = name.partition(".weight_scale")
        weight = stock.map_name(f"{stem}.weight")
        expected = f"{weight}_scale" if is_scale else stock.map_name(name)
        assert kept.map_name(name) == expected


def test_stock_vllm_renames_scales() -> None:
    """If this fails, vLLM has filled the gap: remove `keep_weight_scale`."""
    name = DeepseekV4ForCausalLM.hf_to_vllm_mapper.map_name("layers.2.attn.wq_a.weight_scale")
    assert name == "model.layers.2.attn.wq_a.weight_scale_inv"
