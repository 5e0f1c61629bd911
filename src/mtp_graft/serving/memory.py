"""How much memory a checkpoint needs on each rank: an estimate from headers and config.

The KV cache, all of which every rank holds, is by vLLM 0.32's rules, as docs/doctor.md derives: one
pool for all sequences, its blocks the size of the widest group of layers.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mtp_graft.dsv4.config import compress_ratios
from mtp_graft.dsv4.names import NEVER_QUANTIZED
from mtp_graft.errors import GraftError
from mtp_graft.serving.profiles import MAX_NUM_BATCHED_TOKENS
from mtp_graft.serving.topology import Hardware

#: Tokens of a KV block of compressed layers; vLLM has no other for this model.
BLOCK_TOKENS = 256
#: A rank's activations of a step of 8,192 tokens, CUDA graphs, NCCL and context (docs/doctor.md).
RESERVE_BYTES = 4 * 2**30
#: vLLM's own share of a GPU's memory, unless told otherwise (0.32).
UTILIZATION = 0.92

_GIB = 2**30
_PAGE_ALIGNMENT = 576  # of FlashMLA's packed FP8 layout
_ENTRY_BYTES = 584  # a cached FP8 vector: 448 without RoPE, 64 with in BF16, 8 of scales
_WINDOW_PAGE_TOKENS = 64

#: Tensors of which each rank holds its share; all others are on every rank.
_CUT = re.compile(
    r"\.ffn\.(experts\.\d+|shared_experts)\.w[123]\."
    r"|^(model\.)?(layers|mtp)\.\d+\.attn\.(wq_b|wo_a|wo_b|attn_sink)(\.|$)"
    r"|^(model\.)?(embed(_tokens)?|head)\.weight$"
)


def weights_bytes(tensors: Mapping[str, Tensor], tp: int, *, decoded: bool = False) -> int:
    """Return the bytes of weights on one of `tp` ranks; `decoded` as the CPU plugin keeps them."""
    total = 0
    for name, tensor in tensors.items():
        in_bf16 = decoded or NEVER_QUANTIZED.search(name)  # the plugin decodes these on GPUs too
        size = _decoded_bytes(name, tensor) if in_bf16 else tensor.nbytes
        total += -(-size // tp) if _CUT.search(name) else size
    return total


def _decoded_bytes(name: str, tensor: Tensor) -> int:
    """Return a tensor's size in the CPU's memory: experts in float32, FP8 linears in BF16."""
    if name.endswith((".weight_scale", ".weight_shape")):
        return 0
    if name.endswith(".weight_packed"):
        return 8 * tensor.nbytes  # half a byte a code
    if tensor.element_size() == 1 and tensor.is_floating_point():
        return 2 * tensor.numel()
    return tensor.nbytes


def _kv_layout(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the bytes of an FP8 block, and how many groups of sliding-window layers draw them."""
    if (ratios := compress_ratios(config)) is None:
        found = f"compress_ratios is {config.get('compress_ratios')!r:.200}"
        raise GraftError(f"config.json: {found}; expected a list of whole numbers")
    layers = config["num_hidden_layers"] + (config.get("num_nextn_predict_layers") or 0)
    num_c4, num_c128 = ratios[:layers].count(4), ratios[:layers].count(128)
    counts = [layers, *(count for count in (num_c4, num_c128) if count)]
    if num_c4 and num_c4 == num_c128:  # then the compressed layers count as a pattern as well
        counts.append(num_c4)
    sizes = range(max(num_c4, 1), max(counts) + 1)
    # vLLM groups as many sliding-window layers as pads least; the larger of two such numbers.
    repeats = min(sizes, key=lambda size: (sum(-count % size for count in counts), -size))
    index_entry = config["index_head_dim"] + 4  # a scale
    pages_c4 = _page(BLOCK_TOKENS // 4, _ENTRY_BYTES) + _page(BLOCK_TOKENS // 4, index_entry)
    compressed = num_c4 * pages_c4 + num_c128 * _page(BLOCK_TOKENS // 128, _ENTRY_BYTES)
    windows = min(repeats, layers) * _page(_WINDOW_PAGE_TOKENS, _ENTRY_BYTES)
    return max(compressed, windows), -(-layers // repeats)


def _page(entries: int, entry_bytes: int) -> int:
    return -(-entries * entry_bytes // _PAGE_ALIGNMENT) * _PAGE_ALIGNMENT


def kv_cache_bytes(config: Mapping[str, Any], tokens: int, tokens_in_flight: int = 0) -> int:
    """Return what one sequence of `tokens` takes on every rank; GraftError without ratios.

    Windows and compressor states keep `tokens_in_flight`, those of the steps being computed. vLLM
    counts `max_num_batched_tokens`, twice if asynchronous.
    """
    block_bytes, window_groups = _kv_layout(config)

    def sliding(window: int, page_tokens: int) -> int:
        held = min(window - 1 + tokens_in_flight, tokens)
        return -(-held // page_tokens) + 1  # a window need not start where a block does

    blocks = -(-tokens // BLOCK_TOKENS)
    blocks += window_groups * sliding(config["sliding_window"], _WINDOW_PAGE_TOKENS)
    blocks += sliding(2 * 4, 4) + sliding(128, 8)  # the compressors' states, of either ratio
    return block_bytes * blocks


def num_positions(config: Mapping[str, Any]) -> int:
    """Return the longest context that the model has positions for."""
    return int(config.get("max_position_embeddings") or 2**20)


@dataclass(frozen=True)
class Room:
    """The memory of one rank, in bytes, and what has its place there besides the KV cache."""

    config: Mapping[str, Any]
    memory: int
    weights: int
    reserve: int
    tokens_in_flight: int

    def cache(self, share: float | None) -> int:
        """Return what a share of the memory leaves for the KV cache; negative if too little."""
        return int((share or 1) * self.memory) - self.weights - self.reserve

    def largest_context(self, share: float | None) -> int:
        """Return the longest context of a sequence, in whole blocks or all positions."""
        positions = num_positions(self.config)
        tokens = bisect_right(range(1, positions + 1), self.cache(share), key=self._needed)
        return tokens if tokens == positions else tokens // BLOCK_TOKENS * BLOCK_TOKENS

    def _needed(self, tokens: int) -> int:
        return kv_cache_bytes(self.config, tokens, self.tokens_in_flight)

    def estimate(self, tokens: int, share: float | None) -> str:
        """Say what weights and a sequence of `tokens` take, and what is left for the KV cache."""
        text = f"estimate for a rank: weights {self.weights / _GIB:.1f} GiB"
        if share is not None:
            left = f"{max(self.cache(share), 0) / _GIB:.1f} GiB left for the KV cache at {share:g}"
            text += f", {self.reserve / _GIB:.0f} GiB for all else, {left} of the memory"
        needed = self._needed(tokens) / _GIB
        return f"{text}; a sequence of {tokens} tokens takes {needed:.2f} GiB (docs/doctor.md)"


def measure_room(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    hardware: Hardware,
    tp: int,
    step_tokens: int = MAX_NUM_BATCHED_TOKENS,
) -> Room:
    """Return the room of one of `tp` ranks for a checkpoint; a CPU's ranks share its memory."""
    on_cpu = hardware.gpu is None
    memory = hardware.memory_bytes // (tp if on_cpu else 1)
    weights = weights_bytes(tensors, tp, decoded=on_cpu)
    # Twice: with asynchronous scheduling the next step is prepared while one is computed.
    return Room(config, memory, weights, 0 if on_cpu else RESERVE_BYTES, 2 * step_tokens)
