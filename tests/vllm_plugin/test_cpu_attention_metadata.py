"""A step's attention metadata against loops that follow the definitions of vLLM's kernels.

How drafts are flattened is for `engine/test_engines.py`: text with the head is the base's.

Everything is called through vLLM's own launchers and functions. Outputs start out filled with
STALE: what a kernel does not write has to stay so.
"""

import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.models.deepseek_v4.cpu import cpu_mla
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mla import compressor_utils, indexer, sparse_swa
from vllm.v1.attention.ops import metadata
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.cpu import attention_metadata
from mtp_graft.vllm_plugin.replacing import replace

pytestmark = pytest.mark.vllm

attention_metadata.fill_gaps()

STALE = -77
PAD = -1
MAX_CONTEXT = 700
exhaustive = settings(max_examples=60, deadline=None)


@dataclass
class Batch:
    """Requests as a scheduler hands them over: tokens cached so far, and tokens of this step."""

    contexts: list[int]
    queries: list[int]
    block_size: int
    block_table: list[list[int]]
    padded: list[bool]  # per token: its slot is PAD

    @property
    def starts(self) -> list[int]:
        return [sum(self.queries[:r]) for r in range(len(self.queries) + 1)]

    @property
    def seq_lens(self) -> list[int]:
        return [c + q for c, q in zip(self.contexts, self.queries, strict=True)]

    def tokens(self) -> list[tuple[int, int, int]]:
        """Per token: its index in the batch, its request, its position in the request."""
        places = [(r, q) for r, query in enumerate(self.queries) for q in range(query)]
        return [(t, r, self.contexts[r] + q) for t, (r, q) in enumerate(places)]

    def slot(self, request: int, entry: int) -> int:
        block, offset = divmod(entry, self.block_size)
        return self.block_table[request][block] * self.block_size + offset


@st.composite
def batches(draw: st.DrawFn, max_query: int = 12) -> Batch:
    queries = draw(st.lists(st.integers(0, max_query), min_size=1, max_size=5))
    if sum(queries) == 0:
        queries[-1] = 1
    contexts = [draw(st.integers(0, MAX_CONTEXT)) for _ in queries]
    block_size = draw(st.sampled_from([2, 64, 256]))
    columns = (MAX_CONTEXT + max_query) // block_size + 1
    blocks = list(range(len(queries) * columns))
    draw(st.randoms(use_true_random=False)).shuffle(blocks)
    table = [blocks[r * columns : (r + 1) * columns] for r in range(len(queries))]
    padded = [draw(st.booleans()) for _ in range(sum(queries))]
    return Batch(contexts, queries, block_size, table, padded)


def i32(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def stale(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.full(shape, STALE, dtype=dtype)


def test_each_token_maps_to_the_request_that_owns_it() -> None:
    """Those that are not mapped to 0, those behind the last request to it."""
    buffer = stale(11)
    mapped = metadata.compute_token_to_req_indices(i32([0, 2, 2, 5]), buffer, 6, 8)
    assert mapped.tolist() == [0, 0, 2, 2, 2, 2, 0, 0]
    assert buffer[8:].tolist() == [STALE] * 3


@exhaustive
@given(batches(), st.sampled_from([1, 2, 7, 128]), st.data())
def test_window_slots_are_those_of_the_positions_a_token_may_read(
    batch: Batch, window_size: int, data: st.DataObject
) -> None:
    num_tokens = len(batch.padded)
    offset = data.draw(st.integers(0, num_tokens - 1), label="token_offset")
    num_rows = data.draw(st.integers(1, num_tokens - offset), label="num_tokens")
    replay = [data.draw(st.sampled_from([-1, 0, c // 2, c])) for c in batch.contexts]
    expected = []
    for token, request, position in batch.tokens()[offset : offset + num_rows]:
        start = max(position - window_size + 1, 0, replay[request])
        seen = [] if batch.padded[token] else list(range(start, position + 1))
        expected.append([batch.slot(request, p) for p in seen])

    indices, lens = stale(num_tokens + 2, 1, window_size), stale(num_tokens + 2)
    # A padded token's request index may be anything: it must not be looked up.
    requests = [999 if batch.padded[t] else r for t, r, _ in batch.tokens()]
    sequences = (i32(batch.starts), i32(batch.seq_lens), i32(requests), ~torch.tensor(batch.padded))
    cache = (i32(batch.block_table), batch.block_size, i32(replay))
    sparse_swa._COMPUTE_SWA_INDICES_AND_LENS_KERNEL(
        *(indices, lens, window_size, window_size, lens, lens, *sequences, *cache),
        num_tokens=num_rows,
        token_offset=offset,
    )
    rows = [row + [PAD] * (window_size - len(row)) for row in expected]
    assert indices[:num_rows, 0].tolist() == rows
    assert lens[:num_rows].tolist() == [len(row) for row in expected]
    assert (indices[num_rows:] == STALE).all() and (lens[num_rows:] == STALE).all()


@exhaustive
@given(batches(), st.sampled_from([1, 7, 128]), st.data())
def test_prefills_gather_their_query_and_their_window(
    batch: Batch, window_size: int, data: st.DataObject
) -> None:
    num_decodes = data.draw(st.integers(0, len(batch.queries) - 1))
    replay = [data.draw(st.integers(0, MAX_CONTEXT)) for _ in batch.queries]
    expected = [
        batch.queries[r] + min(max(batch.contexts[r] - replay[r], 0), window_size - 1)
        for r in range(num_decodes, len(batch.queries))
    ]
    gathered = stale(len(expected) + 1)
    sequences = (i32(batch.seq_lens), i32(batch.starts), i32(replay))
    sparse_swa._COMPUTE_PREFILL_METADATA_KERNEL(
        gathered, *sequences, len(expected), num_decodes, window_size
    )
    assert gathered.tolist() == [*expected, STALE]


@exhaustive
@given(batches(max_query=300), st.sampled_from([4, 128]))
def test_the_last_token_of_a_group_maps_to_its_compressed_slot(batch: Batch, ratio: int) -> None:
    expected = [PAD] * len(batch.padded)
    for token, request, position in batch.tokens():
        if (position + 1) % ratio == 0 and not batch.padded[token]:
            expected[token] = batch.slot(request, position // ratio)
    mapped = compressor_utils.get_compressed_slot_mapping(
        len(batch.padded),
        torch.where(torch.tensor(batch.padded), PAD, 5),
        i32(batch.starts),
        i32(batch.seq_lens),
        i32(batch.block_table),
        batch.block_size,
        ratio,
    )
    assert mapped.tolist() == expected


def test_a_padded_request_and_requests_beyond_the_table_have_no_compressed_slots() -> None:
    slots, seq_lens = torch.arange(6), i32([4, 0])  # the second's positions are -4 .. -1
    arguments = (slots, i32([0, 2, 6]), seq_lens, i32([[3], [0]]), 64, 4)
    mapped = compressor_utils.get_compressed_slot_mapping(6, *arguments)
    assert mapped.tolist() == [PAD, 3 * 64, PAD, PAD, PAD, PAD]
    out = stale(8, dtype=torch.int64)
    compressor_utils._COMPRESSED_SLOT_MAPPING_KERNEL(
        out, torch.zeros(8).long(), i32([0, 4, 8]), i32([4, 4]), i32([[6]]), 64, 4, 1, 1
    )
    assert out.tolist() == [PAD, PAD, PAD, 6 * 64, STALE, STALE, STALE, STALE]


@exhaustive
@given(batches(max_query=40), st.sampled_from([1, 4, 128]), st.data())
def test_prefill_chunks_bound_the_keys_of_every_query_token(
    batch: Batch, ratio: int, data: st.DataObject
) -> None:
    qs_start = data.draw(st.integers(0, len(batch.padded)), label="query_slice_start")
    qs_stop = data.draw(st.integers(qs_start, len(batch.padded)), label="query_slice_stop")
    lengths = [seq_len // ratio for seq_len in batch.seq_lens]
    bounds = [sum(lengths[:r]) for r in range(len(lengths) + 1)]
    queries = batch.tokens()[qs_start:qs_stop]

    owner = stale(bounds[-1] + 2)  # the caller allocates for an upper bound
    ks, ke = stale(qs_stop - qs_start), stale(qs_stop - qs_start)
    sequences = (i32(batch.starts), i32(batch.seq_lens), i32(bounds), i32(bounds))
    indexer._BUILD_PREFILL_CHUNK_METADATA_KERNEL(
        *(*sequences, owner, ks, ke, qs_start, qs_stop, 0, 1, 1),
        num_reqs=len(batch.queries),
        COMPRESS_RATIO=ratio,
    )
    assert ks.tolist() == [bounds[r] for _, r, _ in queries]
    assert ke.tolist() == [bounds[r] + (position + 1) // ratio for _, r, position in queries]
    owners = [r for r, length in enumerate(lengths) for _ in range(length)]
    assert owner.tolist() == [*owners, STALE, STALE]


def test_no_layer_type_has_a_plan() -> None:
    builder = cpu_mla.DeepseekV4CPUSparseSWAMetadataBuilder
    plans = builder.__new__(builder).build_tile_scheduler(3)
    assert {plans[layer_type] for layer_type in ("swaonly", "c1a", "c4a", "new")} == {None}


def requests_of_drafts(build: Any) -> list[list[int]]:
    """Ask for the tokens' requests as `propose` does: three tokens of two requests, then drafts."""
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    common = CommonAttentionMetadata(
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
    found = [build(None, common, 0)]
    common.num_actual_tokens, common.max_query_len = 2, 1
    common.query_start_loc = torch.arange(3, dtype=torch.int32)
    common.query_start_loc_cpu = torch.arange(3, dtype=torch.int32)
    return [*found, build(None, common, 1), build(None, common, 2)]


def test_every_request_gets_its_own_drafts_and_stock_vllm_mixes_them_up() -> None:
    """If the second half fails, vLLM has filled the gap: remove `forgetting`."""

    def stock(_self: Any, metadata: Any, _draft_index: int) -> Any:
        return metadata.token_to_req_indices(torch.zeros(64, dtype=torch.int32)).tolist()

    tokens = [0, 0, 0, 1, 1, 1]
    assert requests_of_drafts(attention_metadata.forgetting(stock)) == [tokens, [0, 1], [0, 1]]
    assert requests_of_drafts(stock) == [tokens, [0, 0], [0, 0]]
    assert hasattr(SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata, "__wrapped__")


@pytest.mark.parametrize("others", [["x"], ["x", "y", "z"], ["y", "x"], None])
def test_a_function_with_other_arguments_is_not_replaced(others: list[str] | None) -> None:
    owner = types.ModuleType("a_module")
    if others is not None:
        exec(f"def function({', '.join(others)}): ...", vars(owner))
    before = vars(owner).get("function")
    with pytest.raises(GraftError, match=r"a_module\.function takes .*, expected \['x', 'y'\]"):
        replace(owner, "function", lambda x, y: None)
    assert vars(owner).get("function") is before
