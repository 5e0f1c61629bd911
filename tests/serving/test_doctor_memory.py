"""The memory estimate: against vLLM's own grouping, a real engine's report, and by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_graft.checkpoint.shards import read_meta
from mtp_graft.serving.memory import Room, kv_cache_bytes, weights_bytes

from .flash import CONFIG as FLASH

WITHOUT_HEAD = {**FLASH, "num_nextn_predict_layers": 0}
PRO_LIKE = {**FLASH, "num_hidden_layers": 61, "compress_ratios": [128] * 2 + [4, 128] * 29 + [4, 0]}


@pytest.mark.vllm
@pytest.mark.parametrize("config", [FLASH, WITHOUT_HEAD, PRO_LIKE], ids=["flash", "base", "61"])
@pytest.mark.parametrize("length", [1000, 131072, 2**20])
@pytest.mark.parametrize("in_flight", [512, 16384])
def test_kv_bytes_are_those_of_vllm(config: dict[str, Any], length: int, in_flight: int) -> None:
    assert kv_cache_bytes(config, length, in_flight) == by_vllm(config, length, in_flight)


def by_vllm(config: dict[str, Any], length: int, in_flight: int) -> int:
    """Group the caches that vLLM's DeepSeek-V4 layers register, with vLLM's own functions."""
    from vllm.v1.core import kv_cache_utils

    layout, sizes = SimpleNamespace(is_block_outermost=True), ("decode", "prefill")
    parallel = SimpleNamespace(**{f"{kind}_context_parallel_size": 1 for kind in sizes})
    vllm_config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        model_config=SimpleNamespace(max_model_len=length),
        **{"speculative_config": None, "max_in_flight_tokens": in_flight},
        parallel_config=parallel,
    )
    specs = registered_specs(config)
    groups = kv_cache_utils._get_packed_kv_cache_groups(vllm_config, specs)
    assert groups is not None
    return int(kv_cache_utils._max_memory_usage_bytes_from_groups(vllm_config, groups))


def registered_specs(config: dict[str, Any]) -> dict[str, Any]:
    """Return the specs of vllm/models/deepseek_v4 0.32.0, one a cache."""
    from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowMLASpec

    common = {"num_kv_heads": 1, "alignment": 576, "max_tp_shards": 1}
    packed = {"state_content_bytes": 584, "model_version": "deepseek_v4", "dtype": torch.uint8}

    def states(size: int, ratio: int) -> Any:
        overlap = 1 + (ratio == 4)
        sizes = {"block_size": 4 if ratio == 4 else 8, "head_size": 2 * overlap * size}
        how = {"dtype": torch.float32, "sliding_window": overlap * ratio}
        return SlidingWindowMLASpec(**sizes, **how, **common)

    specs: dict[str, Any] = {}
    layers = config["num_hidden_layers"] + config["num_nextn_predict_layers"]
    for n, ratio in enumerate(config["compress_ratios"][:layers]):
        specs[f"{n}.swa"] = SlidingWindowMLASpec(
            block_size=64, head_size=512, sliding_window=128, **packed, **common
        )
        if ratio > 1:
            specs[f"{n}.attn"] = MLAAttentionSpec(
                block_size=256, head_size=512, tokens_per_state=ratio, **packed, **common
            )
            specs[f"{n}.state"] = states(512, ratio)
        if ratio == 4:
            specs[f"{n}.index"] = MLAAttentionSpec(
                block_size=256, head_size=132, dtype=torch.uint8, tokens_per_state=4, **common
            )
            specs[f"{n}.index_state"] = states(128, 4)
    return specs


@given(gib=st.floats(0.1, 40), in_flight=st.sampled_from([0, 2048, 16384]))
def test_the_largest_context_fits_and_one_block_more_does_not(gib: float, in_flight: int) -> None:
    budget = int(gib * 2**30)
    most = Room(FLASH, budget, 0, 0, in_flight).largest_context(None)
    assert most == 0 or kv_cache_bytes(FLASH, most, in_flight) <= budget
    assert most == 2**20 or kv_cache_bytes(FLASH, most + 256, in_flight) > budget


def test_ranks_share_experts_and_heads_and_repeat_the_rest(tiny_model: Path) -> None:
    tensors = read_meta(tiny_model / "base")
    shared = ("experts.", "attn.wq_b", "attn.wo_", "attn_sink", "embed.", "head.")
    cut = sum(t.nbytes for name, t in tensors.items() if any(part in name for part in shared))
    whole = sum(t.nbytes for t in tensors.values())
    assert weights_bytes(tensors, 1) == whole
    assert abs(weights_bytes(tensors, 2) - (whole - cut / 2)) < 1000


def test_the_cpu_decodes_experts_and_fp8_and_a_gpu_fp8_compressors_alone() -> None:
    packed, expert = torch.empty(4, 16, dtype=torch.int32), torch.empty(4, 64, dtype=torch.uint8)
    fp8, scale = torch.empty(8, 8, dtype=torch.float8_e4m3fn), torch.empty(4, 1).bfloat16()
    stored = {
        "layers.0.ffn.experts.0.w1.weight_packed": packed,
        "layers.0.ffn.experts.0.w1.weight_scale": scale,
        "mtp.0.ffn.experts.0.w1.weight_packed": expert,
        "layers.2.attn.compressor.wkv.weight": fp8,
        "layers.2.attn.compressor.wkv.weight_scale": scale,
        "layers.2.attn.wkv.weight": fp8,
        "norm.weight": torch.empty(8).bfloat16(),
    }
    assert weights_bytes(stored, 1, decoded=True) == 4 * 128 * 4 * 2 + 2 * 64 * 2 + 8 * 2
    assert weights_bytes(stored, 1) == 4 * 16 * 4 + 8 + 4 * 64 + 64 * 2 + 64 + 8 * 2
