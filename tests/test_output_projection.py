"""Attention's output projection of a token alone and beside others: the same bits."""

import pytest

pytest.importorskip("vllm", reason="the attention is vLLM's: install the cpu extra")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM for another platform than the CPU", allow_module_level=True)

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from vllm.models.deepseek_v4.cpu import cpu_sparse
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.cpu.output_projection import RowwiseAttention, project_rowwise

pytestmark = pytest.mark.vllm

HEADS, HEAD_DIM, GROUPS, RANK, ROPE_DIM = 4, 512, 2, 128, 64


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> DeepseekV4CPUAttention:
    """Return vLLM's attention with what its output projection needs, and no `wo_b`."""
    step = SimpleNamespace(attn_metadata={})
    monkeypatch.setattr(cpu_sparse, "get_forward_context", lambda: step)
    generator = torch.Generator().manual_seed(0)
    wo_a = torch.randn(GROUPS, RANK, HEADS * HEAD_DIM // GROUPS, generator=generator) / 32
    attention = DeepseekV4CPUAttention.__new__(DeepseekV4CPUAttention)
    nn.Module.__init__(attention)
    attention.n_local_groups, attention.head_dim, attention.o_lora_rank = GROUPS, HEAD_DIM, RANK
    attention._wo_a_packed = torch.ops._C.convert_weight_packed(wo_a.bfloat16())
    cos_sin = torch.randn(256, ROPE_DIM, generator=generator)
    attention.rotary_emb = SimpleNamespace(cos_sin_cache=cos_sin)
    attention.wo_b = nn.Identity()
    return attention


def heads(num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator).bfloat16()


@pytest.mark.parametrize("num_tokens", [2, 4, 5, 8, 33, 96])
def test_a_token_alone_and_beside_others_gives_the_same_bits(
    num_tokens: int, attention: DeepseekV4CPUAttention
) -> None:
    o, positions = heads(192), torch.arange(192)
    stock = attention._o_proj(o, positions)
    project_rowwise(nn.Sequential(attention))
    assert type(attention) is RowwiseAttention
    alone = [attention._o_proj(o[t : t + 1], positions[t : t + 1]) for t in range(192)]
    pairs = zip(o.split(num_tokens), positions.split(num_tokens), strict=True)
    together = torch.cat([attention._o_proj(*pair) for pair in pairs])
    assert torch.equal(together, torch.cat(alone))
    torch.testing.assert_close(together, stock, rtol=1e-2, atol=1e-2)


def test_a_model_without_attention_is_an_error() -> None:
    with pytest.raises(GraftError, match="no attention"):
        project_rowwise(nn.Sequential(nn.Identity()))
