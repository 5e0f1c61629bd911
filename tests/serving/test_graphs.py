"""Every decode step of a server on a GPU has a CUDA graph, with any supported vLLM."""

from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

from mtp_graft.serving.graphs import missing_sizes, own_sizes

OLD, NEW = Version("0.26.0"), Version("0.29.0")


def test_only_sequences_that_fill_no_size_of_vllms_need_their_own() -> None:
    needed = {n: missing_sizes(n, 1, OLD) for n in range(1, 9)}
    assert {n for n, sizes in needed.items() if sizes} == {3, 5, 6, 7}
    assert needed[3] == [2, 4, 6, 12]
    assert missing_sizes(4, 2, OLD) == [3, 6, 9, 12, 24]
    assert (
        missing_sizes(3, 1, NEW) == missing_sizes(None, 1, OLD) == missing_sizes(17, 1, OLD) == []
    )


@pytest.mark.vllm
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("sequences", range(1, 9))
def test_vllm_finds_a_whole_graph_for_every_number_of_streams(sequences: int, tokens: int) -> None:
    """vLLM's own dispatcher decides, with the sizes that 0.26 would capture, and with ours."""
    fullest = sequences * tokens
    ours = missing_sizes(sequences, tokens - 1, OLD)
    stock = graphs(own_sizes(fullest, tokens), sequences, tokens)
    assert (stock[-1] != "FULL") == bool(ours)
    assert graphs(ours or own_sizes(fullest, tokens), sequences, tokens) == ["FULL"] * sequences


def graphs(sizes: list[int], sequences: int, tokens: int) -> list[str]:
    """Return the kind of graph that vLLM takes for a decode step of 1, 2, … streams."""
    from vllm.config import CompilationConfig, CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config: Any = CompilationConfig(cudagraph_mode=mode, cudagraph_capture_sizes=sizes)
    config.max_cudagraph_capture_size = sizes[-1]
    dispatcher: Any = CudagraphDispatcher.__new__(CudagraphDispatcher)
    dispatcher.compilation_config = config
    scheduler = SimpleNamespace(max_num_seqs=sequences, max_num_batched_tokens=8192)
    dispatcher.vllm_config = SimpleNamespace(
        scheduler_config=scheduler, lora_config=None, speculative_config=None
    )
    dispatcher.uniform_decode_query_len = tokens
    dispatcher.cudagraph_keys = {CUDAGraphMode.PIECEWISE: set(), CUDAGraphMode.FULL: set()}
    dispatcher.specialize_lora_count = False
    dispatcher.initialize_cudagraph_keys(mode, tokens)
    steps = [n * tokens for n in range(1, sequences + 1)]
    return [dispatcher.dispatch(step, uniform_decode=True)[0].name for step in steps]
