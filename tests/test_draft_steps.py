"""Which request a draft belongs to, from the second draft of a step on."""

from typing import Any

import pytest

pytestmark = pytest.mark.vllm


@pytest.fixture
def proposer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's proposer class, as stock until `apply` is called; restored afterwards."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    from mtp_graft.vllm_plugin import triton_kernels

    triton_kernels.register()  # vLLM's mapping of tokens to requests is a Triton kernel

    def ask(self: Any, metadata: Any, draft_index: int = 0) -> Any:
        return metadata.token_to_req_indices(self.buffer).tolist()

    monkeypatch.setattr(SpecDecodeBaseProposer, "build_per_group_and_layer_attn_metadata", ask)
    return SpecDecodeBaseProposer


def drafts(proposer: Any) -> list[list[int]]:
    """Ask for the tokens' requests as `propose` does: three tokens of two requests, then drafts."""
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    instance = proposer.__new__(proposer)
    instance.buffer = torch.zeros(64, dtype=torch.int32)
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    metadata = CommonAttentionMetadata(
        query_start_loc=bounds,
        query_start_loc_cpu=bounds.clone(),
        seq_lens=torch.tensor([50, 70], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=6,
        max_query_len=3,
        max_seq_len=70,
        block_table_tensor=torch.zeros(2, 4, dtype=torch.int32),
        slot_mapping=torch.zeros(6, dtype=torch.int64),
    )
    found = [instance.build_per_group_and_layer_attn_metadata(metadata)]
    metadata.num_actual_tokens, metadata.max_query_len = 2, 1
    metadata.query_start_loc = torch.arange(3, dtype=torch.int32)
    metadata.query_start_loc_cpu = torch.arange(3, dtype=torch.int32)
    for index in (1, 2):
        found.append(instance.build_per_group_and_layer_attn_metadata(metadata, draft_index=index))
    return found


def test_stock_vllm_takes_every_draft_for_the_first_requests(proposer: Any) -> None:
    """If this fails, vLLM has filled the gap: remove the remedy."""
    assert drafts(proposer) == [[0, 0, 0, 1, 1, 1], [0, 0], [0, 0]]


def test_every_request_gets_its_own_drafts(proposer: Any) -> None:
    from mtp_graft.vllm_plugin import draft_steps

    draft_steps.apply()
    draft_steps.apply()
    assert drafts(proposer) == [[0, 0, 0, 1, 1, 1], [0, 1], [0, 1]]
