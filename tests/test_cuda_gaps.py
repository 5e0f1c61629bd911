"""The CUDA shims' arithmetic, on a CPU; that the patched engine decodes right needs a GPU."""

import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="the shims patch vLLM: install an extra")

from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.quantization.utils import marlin_utils

from mtp_graft.vllm_plugin.cuda import expert_scales, graph_breaks

pytestmark = pytest.mark.vllm


def scales_of_w13(intermediate: int) -> torch.Tensor:
    """What vLLM's conversion to Marlin makes of w13's scales, with 256 inputs in two groups.

    The first 256 columns are the same for every size, and so is what Marlin needs.
    """
    columns = 2 * intermediate
    scales = torch.arange(columns * 2, dtype=torch.float32).reshape(1, columns, 2)
    converted = int_wna16._process_weights_marlin(
        layer=SimpleNamespace(intermediate_size_per_partition=intermediate),
        input_dtype=None,
        num_bits=4,
        pack_factor=8,
        group_size=128,
        w13_qweight=torch.zeros(1, columns, 32, dtype=torch.int32),
        w2_qweight=torch.zeros(1, 256, intermediate // 8, dtype=torch.int32),
        w13_scales=scales,
        w2_scales=torch.zeros(1, 256, intermediate // 128),
    )
    return converted[2][0, 0, :256]  # of the first group


@pytest.fixture
def _marlin_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are repacked by an operator that a CPU build lacks; scales are not."""
    monkeypatch.setattr(int_wna16.ops, "gptq_marlin_moe_repack", lambda codes, *_, **__: codes)
    monkeypatch.setattr(
        int_wna16, "marlin_moe_permute_scales", marlin_utils.marlin_moe_permute_scales
    )


@pytest.mark.usefixtures("_marlin_on_a_cpu")
def test_stock_vllm_mixes_up_scales_where_a_ranks_share_is_one_group() -> None:
    """If this fails, vLLM has mended it: `expert_scales` is not needed any more."""
    assert not torch.equal(scales_of_w13(128), scales_of_w13(256))


@pytest.mark.usefixtures("_marlin_on_a_cpu")
def test_scales_are_in_the_order_of_their_own_number_of_groups() -> None:
    stock = scales_of_w13(256)
    expert_scales.apply()
    expert_scales.apply()
    assert torch.equal(scales_of_w13(128), stock)
    assert torch.equal(scales_of_w13(256), stock)


LATE_VARIABLE = """
import os
from vllm.model_executor.layers.quantization import get_quantization_config
get_quantization_config("compressed-tensors")  # as ModelConfig does
os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"  # as VllmConfig does, after it
from vllm.models.deepseek_v4 import attention
from mtp_graft.vllm_plugin.cuda import graph_breaks

def undecorated():
    found = vars(attention.DeepseekV4Attention)
    return [n for n in graph_breaks.BREAKS if n in found and not hasattr(found[n], "__wrapped__")]

before = undecorated()
graph_breaks.apply()
decorated = vars(attention.DeepseekV4Attention)[before[0]]
graph_breaks.apply()
assert vars(attention.DeepseekV4Attention)[before[0]] is decorated
print(before, undecorated())
"""


def test_attention_gets_the_decorator_that_vllm_set_too_late() -> None:
    command = [sys.executable, "-c", LATE_VARIABLE]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "['_prepare_and_attn_eager', '_sparse_indexer_and_attn'] []"


def test_a_spawned_engine_has_the_decorator_and_needs_no_remedy() -> None:
    script = (
        "from vllm.models.deepseek_v4 import attention\n"
        "from mtp_graft.vllm_plugin.cuda import graph_breaks\n"
        "graph_breaks.apply()\nprint(graph_breaks.remedied)"
    )
    environment = {**os.environ, "VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}  # inherited by the engine
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.splitlines()[-1] == "[]"


def test_a_decorated_attention_runs_between_two_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.compilation import breakable_cudagraph

    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    calls: list[str] = []

    class Attention:
        def _prepare_and_attn_eager(self, out: list[str]) -> None:
            out.append("attention")

    module = ModuleType(Attention.__module__)
    module.Attention = Attention  # type: ignore[attr-defined]
    graph_breaks.decorate(module, breakable_cudagraph.eager_break_during_capture)
    capture = SimpleNamespace(_capturing=True, add_eager=lambda run: (calls.append("cut"), run()))
    Attention()._prepare_and_attn_eager(calls)
    monkeypatch.setattr(breakable_cudagraph.BreakableCUDAGraphCapture, "current", lambda: capture)
    Attention()._prepare_and_attn_eager(calls)
    assert calls == ["attention", "cut", "attention"]
