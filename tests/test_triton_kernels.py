"""The replacements of vLLM's Triton kernels against loops that follow the kernels' definitions.

Everything is called through vLLM's own launchers and functions, so the tests also hold when
vLLM's way of launching changes. Outputs start out filled with STALE: what a kernel does not
write has to stay so.
"""

import sys
import types
from dataclasses import dataclass

import pytest

pytest.importorskip("vllm", reason="the kernels belong to vLLM: install the cpu extra")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM for another platform than the CPU", allow_module_level=True)

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUIndexerMetadataBuilder
from vllm.triton_utils import dispatcher
from vllm.v1.attention.backends.mla import compressor_utils, indexer, sparse_swa
from vllm.v1.attention.ops.metadata import compute_token_to_req_indices

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin import triton_kernels

pytestmark = pytest.mark.vllm

triton_kernels.register()

STALE = -77
PAD = -1
MAX_CONTEXT = 700
exhaustive = settings(max_examples=100, deadline=None)


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

    @property
    def num_tokens(self) -> int:
        return sum(self.queries)

    def tokens(self) -> list[tuple[int, int, int]]:
        """Per token: its index in the batch, its request, its position in the request."""
        places = [(r, q) for r, query in enumerate(self.queries) for q in range(query)]
        return [(t, r, self.contexts[r] + q) for t, (r, q) in enumerate(places)]

    def slot(self, request: int, row: int, rows_per_block: int) -> int:
        return self.block_table[request][row // rows_per_block] * rows_per_block + (
            row % rows_per_block
        )


@st.composite
def batches(draw: st.DrawFn, max_query: int = 12) -> Batch:
    queries = draw(st.lists(st.integers(0, max_query), min_size=1, max_size=5))
    if sum(queries) == 0:
        queries[-1] = 1
    contexts = draw(
        st.lists(st.integers(0, MAX_CONTEXT), min_size=len(queries), max_size=len(queries))
    )
    block_size = draw(st.sampled_from([4, 64, 256]))
    columns = (MAX_CONTEXT + max_query) // block_size + 1
    blocks = list(range(len(queries) * columns))
    draw(st.randoms(use_true_random=False)).shuffle(blocks)
    table = [blocks[r * columns : (r + 1) * columns] for r in range(len(queries))]
    tokens = sum(queries)
    padded = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    return Batch(contexts, queries, block_size, table, padded)


def i32(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def stale(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.full(shape, STALE, dtype=dtype)


@exhaustive
@given(batches(), st.integers(0, 6), st.data())
def test_each_token_maps_to_the_request_that_owns_it(
    batch: Batch, num_extra: int, data: st.DataObject
) -> None:
    num_tokens = batch.num_tokens + num_extra
    num_mapped = data.draw(st.integers(0, num_tokens))
    expected = [0] * num_tokens
    for token in range(num_mapped):
        owners = [r for r, _ in enumerate(batch.queries) if batch.starts[r + 1] > token]
        expected[token] = owners[0] if owners else len(batch.queries) - 1

    buffer = stale(num_tokens + 3)
    mapped = compute_token_to_req_indices(i32(batch.starts), buffer, num_mapped, num_tokens)

    assert mapped.tolist() == expected
    assert buffer[num_tokens:].tolist() == [STALE] * 3


def swa_by_loop(
    batch: Batch, token: int, request: int, pos: int, limits: dict[str, list[int]], shape: list[int]
) -> tuple[list[int], int]:
    """One token's row and length: the kernel's definition, position by position."""
    window_size, index_width = shape
    if batch.padded[token]:
        return [-1] * index_width, 0
    left, right = limits["left"][token], limits["right"][token]
    start = max(pos - (window_size - 1) - max(left - (window_size - 1), 0), 0)
    start = max(start, limits["replay"][request])
    positions = list(range(start, pos + right + 1))
    row = [batch.slot(request, p, batch.block_size) for p in positions][:index_width]
    return row + [-1] * (index_width - len(row)), len(positions)


@exhaustive
@given(batches(), st.sampled_from([1, 2, 7, 128]), st.booleans(), st.data())
def test_window_slots_are_those_of_the_positions_a_token_may_read(
    batch: Batch, window_size: int, has_image: bool, data: st.DataObject
) -> None:
    offset = data.draw(st.integers(0, batch.num_tokens - 1), label="token_offset")
    num_rows = data.draw(st.integers(1, batch.num_tokens - offset), label="num_tokens")
    replay = [data.draw(st.sampled_from([-1, 0, c // 2, c])) for c in batch.contexts]
    left, right = [0] * batch.num_tokens, [0] * batch.num_tokens
    if has_image:
        left = [data.draw(st.integers(0, min(pos, 20))) for _, _, pos in batch.tokens()]
        ends = [batch.seq_lens[r] - 1 - pos for _, r, pos in batch.tokens()]
        right = [data.draw(st.integers(0, end)) for end in ends]
    index_width = window_size + (40 if has_image else 0)
    limits = {"left": left, "right": right, "replay": replay}
    shape = [window_size, index_width]
    rows = batch.tokens()[offset : offset + num_rows]
    expected = [swa_by_loop(batch, *token, limits, shape) for token in rows]

    indices, lens = stale(batch.num_tokens + 2, 1, index_width), stale(batch.num_tokens + 2)
    # A padded token's request index may be anything: it must not be looked up.
    requests = [999 if batch.padded[t] else r for t, r, _ in batch.tokens()]
    visible = (i32(left), i32(right)) if has_image else (lens, lens)
    sequences = (i32(batch.starts), i32(batch.seq_lens), i32(requests), ~torch.tensor(batch.padded))
    cache = (i32(batch.block_table), batch.block_size, i32(replay))
    sparse_swa._COMPUTE_SWA_INDICES_AND_LENS_KERNEL(
        *(indices, lens, window_size, index_width, *visible, *sequences, *cache),
        num_tokens=num_rows,
        token_offset=offset,
        has_image=has_image,
    )

    assert indices[:num_rows, 0].tolist() == [row for row, _ in expected]
    assert lens[:num_rows].tolist() == [length for _, length in expected]
    assert (indices[num_rows:] == STALE).all()
    assert (lens[num_rows:] == STALE).all()


@exhaustive
@given(batches(), st.sampled_from([1, 7, 128]), st.data())
def test_prefills_gather_their_query_and_their_window(
    batch: Batch, window_size: int, data: st.DataObject
) -> None:
    num_decodes = data.draw(st.integers(0, len(batch.queries) - 1))
    replay = [data.draw(st.integers(0, MAX_CONTEXT)) for _ in batch.queries]
    expected = []
    for request in range(num_decodes, len(batch.queries)):
        visible = max(batch.contexts[request] - replay[request], 0)
        expected.append(batch.queries[request] + min(visible, window_size - 1))

    gathered = stale(len(expected) + 1)
    sparse_swa._COMPUTE_PREFILL_METADATA_KERNEL(
        gathered,
        i32(batch.seq_lens),
        i32(batch.starts),
        i32(replay),
        len(expected),
        num_decodes,
        window_size,
    )

    assert gathered.tolist() == [*expected, STALE]


@exhaustive
@given(batches(max_query=300), st.sampled_from([4, 128]), st.sampled_from([1, 16]), st.booleans())
def test_the_last_token_of_a_group_maps_to_its_compressed_slot(
    batch: Batch, ratio: int, interleave: int, into_buffer: bool
) -> None:
    states_per_block = max(batch.block_size // ratio, 1)
    columns = (MAX_CONTEXT + 300) // ratio // states_per_block + 1
    batch.block_table = [
        [r * columns + (c * 7 + 3) % columns for c in range(columns)]
        for r, _ in enumerate(batch.queries)
    ]
    expected = [PAD] * batch.num_tokens
    for token, request, pos in batch.tokens():
        if (pos + 1) % ratio == 0 and not batch.padded[token]:
            expected[token] = batch.slot(request, pos // ratio, states_per_block)

    buffer = stale(batch.num_tokens + 5, dtype=torch.int64) if into_buffer else None
    mapped = compressor_utils.get_compressed_slot_mapping(
        batch.num_tokens,
        torch.where(torch.tensor(batch.padded), PAD, 5),
        i32(batch.starts),
        i32(batch.seq_lens),
        i32(batch.block_table),
        states_per_block,
        ratio,
        out=buffer,
        cp_interleave=interleave,
    )

    assert mapped.dtype == torch.int64
    assert mapped.tolist() == expected
    if buffer is not None:
        assert buffer[batch.num_tokens :].tolist() == [PAD] * 5


@pytest.mark.parametrize("slot", [PAD, 8])
def test_a_padded_request_without_a_sequence_has_no_compressed_slots(slot: int) -> None:
    slots = torch.tensor([8, 9, slot, slot, slot, slot])
    seq_lens = i32([4, 0])  # the second request has no sequence: its positions are -4 .. -1
    arguments = (slots, i32([0, 2, 6]), seq_lens, i32([[3], [0]]), 64, 4)
    mapped = compressor_utils.get_compressed_slot_mapping(6, *arguments)
    assert mapped.tolist() == [PAD, 3 * 64, PAD, PAD, PAD, PAD]


def test_only_the_requests_of_the_block_table_are_mapped() -> None:
    """As in a batch whose `query_start_loc` goes on behind the requests of the table."""
    out = stale(8, dtype=torch.int64)
    compressor_utils._COMPRESSED_SLOT_MAPPING_KERNEL(
        out, torch.zeros(8).long(), i32([0, 4, 8]), i32([4, 4]), i32([[6]]), 64, 4, 1, 1
    )
    assert out.tolist() == [PAD, PAD, PAD, 6 * 64, STALE, STALE, STALE, STALE]


def test_an_unfinished_group_needs_no_block() -> None:
    arguments = (torch.arange(5), i32([0, 5]), i32([5]), i32([[3]]), 1, 4)
    mapped = compressor_utils.get_compressed_slot_mapping(5, *arguments)
    assert mapped.tolist() == [PAD, PAD, PAD, 3, PAD]


def test_a_position_beyond_the_block_table_is_an_error() -> None:
    arguments = (torch.tensor([0]), i32([0, 1]), i32([1024]), i32([[3]]), 64, 4)
    with pytest.raises(IndexError):
        compressor_utils.get_compressed_slot_mapping(1, *arguments)


@exhaustive
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 2))
def test_uniform_decodes_are_flattened_to_one_row_a_token(
    seq_lens: list[int], decode_len: int, wider: int
) -> None:
    columns, num_rows = 3, len(seq_lens) * decode_len
    table = [[10 * r + c for c in range(columns)] for r in range(len(seq_lens))]
    contexts, rows = [], []
    for row in range(num_rows):
        request, place = divmod(row, decode_len)
        contexts.append(max(seq_lens[request] - decode_len + place + 1, 0))
        rows.append(table[request])

    out_lens, out_decode_lens = stale(num_rows + 2), stale(num_rows + 2)
    out_table = stale(num_rows + 2, columns + wider)
    indexer._PREPARE_UNIFORM_DECODE_KERNEL(
        i32(seq_lens), out_lens, i32(table), out_table, out_decode_lens, num_rows, decode_len
    )

    assert out_lens.tolist() == [*contexts, STALE, STALE]
    assert out_decode_lens.tolist() == [1] * num_rows + [STALE, STALE]
    assert out_table[:num_rows, :columns].tolist() == rows
    assert (out_table[num_rows:] == STALE).all()


def dcp_share(length: int, rank: int, world: int, interleave: int) -> int:
    """How many of `length` keys a rank holds if groups of `interleave` go round the ranks."""
    return sum(1 for key in range(length) if key // interleave % world == rank)


@exhaustive
@given(
    batches(max_query=40),
    st.sampled_from([1, 4, 128]),
    st.sampled_from([(0, 1), (0, 2), (1, 2)]),
    st.sampled_from([1, 2, 16]),
    st.data(),
)
def test_prefill_chunks_bound_the_keys_of_every_query_token(
    batch: Batch, ratio: int, rank_of_world: tuple[int, int], interleave: int, data: st.DataObject
) -> None:
    rank, world = rank_of_world
    qs_start = data.draw(st.integers(0, batch.num_tokens), label="query_slice_start")
    qs_stop = data.draw(st.integers(qs_start, batch.num_tokens), label="query_slice_stop")
    lengths = [seq_len // ratio for seq_len in batch.seq_lens]
    shares = [dcp_share(length, rank, world, interleave) for length in lengths]
    row_starts = [sum(shares[:r]) for r in range(len(shares) + 1)]
    bounds = [sum(lengths[:r]) for r in range(len(lengths) + 1)]
    expected_ks, expected_ke = [], []
    for _, request, pos in batch.tokens()[qs_start:qs_stop]:
        expected_ks.append(row_starts[request])
        visible = dcp_share((pos + 1) // ratio, rank, world, interleave)
        expected_ke.append(row_starts[request] + visible)
    expected_owner = [r for r, length in enumerate(lengths) for _ in range(length)]

    owner = stale(bounds[-1] + 2)  # the caller allocates for an upper bound
    ks, ke = stale(qs_stop - qs_start), stale(qs_stop - qs_start)
    sequences = (i32(batch.starts), i32(batch.seq_lens), i32(bounds), i32(row_starts))
    indexer._BUILD_PREFILL_CHUNK_METADATA_KERNEL(
        *(*sequences, owner, ks, ke, qs_start, qs_stop, rank, world, interleave),
        num_reqs=len(batch.queries),
        COMPRESS_RATIO=ratio,
    )

    assert ks.tolist() == expected_ks
    assert ke.tolist() == expected_ke
    assert owner.tolist() == [*expected_owner, STALE, STALE]


def test_prefill_chunk_of_the_cpu_indexer_covers_its_requests() -> None:
    """A decode of 3 tokens, then prefills of 0 and 9 tokens: one chunk for the prefills."""
    starts, seq_lens = i32([0, 3, 3, 12]), i32([50, 8, 13])
    ((requests, query),) = DeepseekV4CPUIndexerMetadataBuilder._split_indexer_prefill_chunks(
        seq_lens[1:] // 4, starts.diff()[1:], 0, 0, request_offset=1
    )
    table = torch.arange(6, dtype=torch.int32).view(3, 2)
    lens = (starts, starts, seq_lens, seq_lens // 4, seq_lens // 4)
    chunk = indexer.build_prefill_chunk_metadata(
        requests.start, requests.stop, *lens, table, 4, query_slice=query
    )
    assert chunk is not None
    # Request 1 has two compressed keys, so request 2's begin at 2; its positions are 4 .. 12.
    assert chunk.cu_seqlen_ks.tolist() == [2] * 9
    assert chunk.cu_seqlen_ke.tolist() == [2 + (position + 1) // 4 for position in range(4, 13)]
    assert chunk.token_to_seq.tolist() == [0, 0, 1, 1, 1]
    assert (chunk.token_start, chunk.token_end) == (3, 12)


def test_registering_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels() -> list[object]:
        return [triton_kernels._find(name) for name in triton_kernels.KERNELS]

    before = kernels()
    monkeypatch.setattr(dispatcher, "register_kernels", None)
    triton_kernels.register()
    assert [id(kernel) for kernel in kernels()] == [id(kernel) for kernel in before]
    assert all(isinstance(kernel, dispatcher.KernelOverride) for kernel in before)


@pytest.fixture
def foreign_kernels(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with one kernel, in place of those that `register` looks for."""
    module = types.ModuleType("foreign_kernels")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    replacements = {"foreign_kernels.kernel": triton_kernels.prefill_metadata}
    monkeypatch.setattr(triton_kernels, "KERNELS", replacements)
    return module


def test_a_kernel_with_other_arguments_is_refused(foreign_kernels: types.ModuleType) -> None:
    def kernel(seq_lens_ptr: Tensor, num_prefills: int) -> None: ...

    foreign_kernels.__dict__["kernel"] = kernel
    with pytest.raises(GraftError, match=r"foreign_kernels\.kernel: the kernel takes \['seq_lens'"):
        triton_kernels.register()
    assert foreign_kernels.__dict__["kernel"] is kernel


def test_nothing_is_replaced_where_triton_runs(
    foreign_kernels: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel() -> None: ...

    foreign_kernels.__dict__["kernel"] = kernel
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    triton_kernels.register()
    assert foreign_kernels.__dict__["kernel"] is kernel


@pytest.mark.usefixtures("foreign_kernels")
def test_a_kernel_that_is_not_there_is_an_error() -> None:
    with pytest.raises(GraftError, match=r"foreign_kernels\.kernel: .* no such Triton kernel"):
        triton_kernels.register()
