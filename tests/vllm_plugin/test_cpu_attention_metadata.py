"""A step's attention metadata against loops that follow the definitions of vLLM's kernels.

How drafts are flattened, that each request gets its own and that no layer asks for a plan, is for
`engine/test_engines.py`.

Everything is called through vLLM's own launchers and functions. Outputs start out filled with
STALE: what a kernel does not write has to stay so.
"""

import types
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.v1.attention.backends.mla import compressor_utils, indexer, sparse_swa
from vllm.v1.attention.ops import metadata

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.cpu import attention_metadata
from mtp_graft.vllm_plugin.replacing import replace

pytestmark = pytest.mark.vllm
attention_metadata.fill_gaps()
STALE = -77
PAD = -1
MAX_CONTEXT = 700
exhaustive = settings(max_examples=60, deadline=None)


def i32(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def stale(*shape: int) -> Tensor:
    return torch.full(shape, STALE, dtype=torch.int32)


@dataclass
class Batch:
    """Requests as a scheduler hands them over."""

    contexts: list[int]  # tokens cached so far
    queries: list[int]  # tokens of this step
    block_size: int
    blocks: list[list[int]]  # of each request
    padded: list[bool]  # per token: its slot is PAD

    def __post_init__(self) -> None:
        self.lengths = [c + q for c, q in zip(self.contexts, self.queries, strict=True)]
        self.starts, self.seq_lens = i32([0, *accumulate(self.queries)]), i32(self.lengths)
        #: Each token's request, and its position in the request.
        spans = enumerate(zip(self.contexts, self.lengths, strict=True))
        self.tokens = [(r, position) for r, span in spans for position in range(*span)]

    def slot(self, request: int, entry: int) -> int:
        block, offset = divmod(entry, self.block_size)
        return self.blocks[request][block] * self.block_size + offset


@st.composite
def batches(draw: st.DrawFn, max_query: int = 12) -> Batch:
    queries = draw(st.lists(st.integers(0, max_query), min_size=1, max_size=5).filter(any))
    contexts = [draw(st.integers(0, MAX_CONTEXT)) for _ in queries]
    block_size = draw(st.sampled_from([2, 64, 256]))
    columns = (MAX_CONTEXT + max_query) // block_size + 1
    blocks = draw(st.permutations(range(len(queries) * columns)))
    table = [blocks[r * columns : (r + 1) * columns] for r in range(len(queries))]
    padded = [draw(st.booleans()) for _ in range(sum(queries))]
    return Batch(contexts, queries, block_size, table, padded)


def test_each_token_maps_to_the_request_that_owns_it() -> None:
    """Those that are not mapped to 0, those behind the last request to it."""
    buffer = stale(11)
    mapped = metadata.compute_token_to_req_indices(i32([0, 2, 2, 5]), buffer, 6, 8)
    assert mapped.tolist() == [0, 0, 2, 2, 2, 2, 0, 0]
    assert buffer[8:].tolist() == [STALE] * 3


@exhaustive
@given(batches(), st.sampled_from([1, 2, 7, 128]), st.data())
def test_a_token_sees_its_window_slots(batch: Batch, window_size: int, data: st.DataObject) -> None:
    num_tokens = len(batch.tokens)
    offset = data.draw(st.integers(0, num_tokens - 1), label="token_offset")
    num_rows = data.draw(st.integers(1, num_tokens - offset), label="num_tokens")
    replay = [data.draw(st.sampled_from([-1, 0, c // 2, c])) for c in batch.contexts]
    expected = []
    for token, (request, position) in enumerate(batch.tokens):
        start = max(position - window_size + 1, 0, replay[request])
        seen = [] if batch.padded[token] else list(range(start, position + 1))
        expected.append([batch.slot(request, p) for p in seen])
    expected = expected[offset : offset + num_rows]

    indices, lens = stale(num_tokens + 2, 1, window_size), stale(num_tokens + 2)
    # A padded token's request index may be anything: it must not be looked up.
    owners = [999 if pad else r for (r, _), pad in zip(batch.tokens, batch.padded, strict=True)]
    sequences = (batch.starts, batch.seq_lens, i32(owners), ~torch.tensor(batch.padded))
    cache = (i32(batch.blocks), batch.block_size, i32(replay))
    launch = {"num_tokens": num_rows, "token_offset": offset}
    sparse_swa._COMPUTE_SWA_INDICES_AND_LENS_KERNEL(
        indices, lens, window_size, window_size, lens, lens, *sequences, *cache, **launch
    )
    rows = [row + [PAD] * (window_size - len(row)) for row in expected]
    assert indices[:num_rows, 0].tolist() == rows
    assert lens[:num_rows].tolist() == [len(row) for row in expected]
    assert (indices[num_rows:] == STALE).all() and (lens[num_rows:] == STALE).all()


@exhaustive
@given(batches(), st.sampled_from([1, 7, 128]), st.data())
def test_prefills_gather_their_window(batch: Batch, window_size: int, data: st.DataObject) -> None:
    num_decodes = data.draw(st.integers(0, len(batch.queries) - 1))
    replay = [data.draw(st.integers(0, MAX_CONTEXT)) for _ in batch.queries]
    prefills = list(zip(batch.queries, batch.contexts, replay, strict=True))[num_decodes:]
    expected = [q + min(max(c - start, 0), window_size - 1) for q, c, start in prefills]
    gathered = stale(len(expected) + 1)
    sequences = (batch.seq_lens, batch.starts, i32(replay))
    sparse_swa._COMPUTE_PREFILL_METADATA_KERNEL(
        gathered, *sequences, len(expected), num_decodes, window_size
    )
    assert gathered.tolist() == [*expected, STALE]


@exhaustive
@given(batches(max_query=300), st.sampled_from([4, 128]))
def test_the_last_token_of_a_group_maps_to_its_compressed_slot(batch: Batch, ratio: int) -> None:
    expected = [PAD] * len(batch.tokens)
    for token, (request, position) in enumerate(batch.tokens):
        if (position + 1) % ratio == 0 and not batch.padded[token]:
            expected[token] = batch.slot(request, position // ratio)
    slots = torch.where(torch.tensor(batch.padded), PAD, 5)
    cache = (i32(batch.blocks), batch.block_size, ratio)
    mapped = compressor_utils.get_compressed_slot_mapping(
        len(slots), slots, batch.starts, batch.seq_lens, *cache
    )
    assert mapped.tolist() == expected


def test_a_padded_request_and_requests_beyond_the_table_have_no_compressed_slots() -> None:
    seq_lens = i32([4, 0])  # the second's positions are -4 .. -1
    arguments = (torch.arange(6), i32([0, 2, 6]), seq_lens, i32([[3], [0]]), 64, 4)
    mapped = compressor_utils.get_compressed_slot_mapping(6, *arguments)
    assert mapped.tolist() == [PAD, 3 * 64, PAD, PAD, PAD, PAD]
    out = torch.full((8,), STALE)
    arguments = (torch.zeros(8).long(), i32([0, 4, 8]), i32([4, 4]), i32([[6]]), 64, 4)
    compressor_utils._COMPRESSED_SLOT_MAPPING_KERNEL(out, *arguments, 1, 1)
    assert out.tolist() == [PAD, PAD, PAD, 6 * 64, STALE, STALE, STALE, STALE]


@exhaustive
@given(batches(max_query=40), st.sampled_from([1, 4, 128]), st.data())
def test_prefill_chunks_bound_a_querys_keys(batch: Batch, ratio: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(batch.tokens)), label="query_slice_start")
    stop = data.draw(st.integers(start, len(batch.tokens)), label="query_slice_stop")
    lengths = [length // ratio for length in batch.lengths]
    bounds = [0, *accumulate(lengths)]
    owner = stale(bounds[-1] + 2)  # the caller allocates for an upper bound
    ks, ke = stale(stop - start), stale(stop - start)
    sequences = (batch.starts, batch.seq_lens, i32(bounds), i32(bounds))
    launch = {"num_reqs": len(batch.queries), "COMPRESS_RATIO": ratio}
    indexer._BUILD_PREFILL_CHUNK_METADATA_KERNEL(
        *sequences, owner, ks, ke, start, stop, 0, 1, 1, **launch
    )
    queries = batch.tokens[start:stop]
    assert ks.tolist() == [bounds[r] for r, _ in queries]
    assert ke.tolist() == [bounds[r] + (position + 1) // ratio for r, position in queries]
    owners = [r for r, length in enumerate(lengths) for _ in range(length)]
    assert owner.tolist() == [*owners, STALE, STALE]


@pytest.mark.parametrize("old", [lambda x: None, lambda y, x: None, None])
def test_a_function_with_other_arguments_is_not_replaced(old: Any) -> None:
    owner = types.ModuleType("a_module")
    if old is not None:
        vars(owner)["function"] = old
    with pytest.raises(GraftError, match=r"a_module\.function takes .*, expected \['x', 'y'\]"):
        replace(owner, "function", lambda x, y: None)
    assert vars(owner).get("function") is old
