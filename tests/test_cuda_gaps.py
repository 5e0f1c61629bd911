"""The CUDA shims' arithmetic, on a CPU; that the patched engine decodes right needs a GPU."""

import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="the shims patch vLLM: install an extra")


from mtp_graft.vllm_plugin.cuda import graph_breaks

pytestmark = pytest.mark.vllm


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
