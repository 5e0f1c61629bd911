"""The CUDA shims' arithmetic, on a CPU; that the patched engine decodes right needs a GPU."""

import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="the shims patch vLLM: install an extra")

from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.quantization.utils import marlin_utils
from vllm.model_executor.layers.rotary_embedding import get_rope

from mtp_graft.vllm_plugin.cuda import expert_scales, graph_breaks, hyper_connections, rope

pytestmark = pytest.mark.vllm

YARN = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 512}
BETAS = {"beta_fast": 32, "beta_slow": 1}


def build_as_vllm_0_26(config: Any, *, compress_ratio: int, **sizes: int) -> Any:
    """The stock function's arithmetic: YaRN whatever the layer."""
    parameters = config.rope_parameters
    parameters["rope_theta"] = (
        config.compress_rope_theta if compress_ratio > 1 else config.rope_theta
    )
    parameters |= {"rope_type": "deepseek_yarn", "mscale": 0, "mscale_all_dim": 0}
    parameters |= {"is_deepseek_v4": True, "rope_dim": sizes["rope_head_dim"]}
    return get_rope(
        sizes["head_dim"],
        max_position=sizes["max_position_embeddings"],
        rope_parameters=parameters,
        is_neox_style=False,
    )


def cos_of(build: Any, compress_ratio: int) -> torch.Tensor:
    config = SimpleNamespace(
        rope_parameters={**YARN, **BETAS}, rope_theta=10000, compress_rope_theta=160000
    )
    sizes = {"head_dim": 512, "rope_head_dim": 64, "max_position_embeddings": 8192}
    cache = build(config, compress_ratio=compress_ratio, **sizes).cos_sin_cache
    assert config.rope_parameters == {**YARN, **BETAS} or build is build_as_vllm_0_26
    return cache[:, :32].float()


def plain_cos() -> torch.Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    return torch.outer(torch.arange(8192, dtype=torch.float64), frequencies).cos().float()


@pytest.fixture
def vllm_config() -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.mark.usefixtures("vllm_config")
def test_sliding_window_layers_get_plain_rotary_embeddings() -> None:
    stock, fixed = build_as_vllm_0_26, rope.plain_on_windows(build_as_vllm_0_26)
    assert (cos_of(stock, 1) - plain_cos())[:128].abs().max() > 0.1
    torch.testing.assert_close(cos_of(fixed, 1), plain_cos(), atol=2e-3, rtol=0)


@pytest.mark.usefixtures("vllm_config")
def test_compressed_layers_keep_yarn() -> None:
    stock, fixed = build_as_vllm_0_26, rope.plain_on_windows(build_as_vllm_0_26)
    assert torch.equal(cos_of(fixed, 4), cos_of(stock, 4))


@pytest.mark.parametrize(
    ("hidden_size", "covered"),
    [(256, False), (1024, False), (2048, True), (4096, True), (5120, True), (7168, True)],
)
def test_hidden_sizes_that_the_fused_kernel_covers(hidden_size: int, covered: bool) -> None:
    assert hyper_connections.is_covered(hidden_size) is covered
    splits = (8, 4) if hidden_size <= 4096 else (4,)
    visited = [hidden_size // n // 256 * 256 * n for n in splits]  # as the kernel counts
    assert (visited == [hidden_size] * len(splits)) is covered


def test_the_two_halves_stand_in_for_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    stock = ModuleType("vllm.models.deepseek_v4.nvidia.model")

    def post(x: Any, residual: Any, post_mix: Any, res_mix: Any) -> str:
        seen["post"] = (x, residual, post_mix, res_mix)
        return "new residual"

    def pre(residual: Any, *mixing: Any, **norm: Any) -> tuple[str, str, str]:
        seen["pre"] = (residual, mixing, norm)
        return "new post", "new res", "new x"

    stock.mhc_post_tilelang, stock.mhc_pre_tilelang = post, pre  # type: ignore[attr-defined]
    package = ModuleType("vllm.models.deepseek_v4.nvidia")
    package.model = stock  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, stock.__name__, stock)
    given: Any = ("x", "residual", "post", "res", "fn", "scale", "base", 1e-6)
    result = hyper_connections.post_then_pre(*given, n_splits=1, tile_n=1, norm_weight="w")
    assert result == ("new residual", "new post", "new res", "new x")
    assert seen["post"] == ("x", "residual", "post", "res")
    assert seen["pre"] == ("new residual", ("fn", "scale", "base", 1e-6), {"norm_weight": "w"})


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
        def attention_impl(self, out: list[str]) -> None:
            out.append("attention")

    module = ModuleType(Attention.__module__)
    module.Attention = Attention  # type: ignore[attr-defined]
    graph_breaks.decorate(module, breakable_cudagraph.eager_break_during_capture)
    capture = SimpleNamespace(_capturing=True, add_eager=lambda run: (calls.append("cut"), run()))
    Attention().attention_impl(calls)
    monkeypatch.setattr(breakable_cudagraph.BreakableCUDAGraphCapture, "current", lambda: capture)
    Attention().attention_impl(calls)
    assert calls == ["attention", "cut", "attention"]
