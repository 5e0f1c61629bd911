"""What a request asks for reaches each of its drafts; that tokens follow it is for the engine."""

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from mtp_graft.vllm_plugin.cpu import sampling

pytestmark = pytest.mark.vllm


def test_stock_vllm_gives_a_draft_no_temperature() -> None:
    """If this fails, vLLM has filled the gap: remove the remedy."""
    current_platform.import_kernels()  # as each of vLLM's workers does when it starts
    current_platform.register_triton_kernel_overrides()
    found = torch.full((3,), -7.0)
    rejection_sampler._expand(
        found, torch.tensor([0.8, 1.0]), torch.tensor([1, 3], dtype=torch.int32), 0, 1
    )
    assert found.tolist() == [-7.0, -7.0, -7.0]


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rejection sampler with the gaps filled; as stock again afterwards."""
    for name in ("expand_batch_to_tokens", "apply_top_k_top_p"):
        monkeypatch.setattr(rejection_sampler, name, getattr(rejection_sampler, name))
    sampling.fill_gaps()


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_each_draft_gets_what_its_request_asks_for(dtype: torch.dtype, index: torch.dtype) -> None:
    """One of the requests drafts nothing; 0 stands for another value."""
    asked, ends = torch.tensor([5, 0, 7, 3, 0]).to(dtype), torch.tensor([2, 3, 3, 6, 7]).to(index)
    found = rejection_sampler.expand_batch_to_tokens(asked, ends, 7, replace_from=0, replace_to=1)
    assert found.dtype == dtype
    assert found.tolist() == [5, 5, 1, 3, 3, 3, 1]
    fractions = rejection_sampler.expand_batch_to_tokens(asked / 2, ends, 7)
    assert fractions.tolist() == [2.5, 2.5, 0, 1.5, 1.5, 1.5, 0]


@pytest.mark.usefixtures("patched")
def test_a_step_of_prompts_alone_has_no_drafts_to_cut_and_stock_vllm_fails() -> None:
    logits, top_k = torch.randn(3, 8), torch.tensor([1, 2, 8], dtype=torch.int32)
    cut = rejection_sampler.apply_top_k_top_p
    assert torch.equal(cut(logits.clone(), top_k, None), apply_top_k_top_p(logits, top_k, None))
    assert cut(logits[:0], top_k[:0], None).shape == (0, 8)
    with pytest.raises((RuntimeError, IndexError)):
        apply_top_k_top_p(logits[:0], top_k[:0], None)
