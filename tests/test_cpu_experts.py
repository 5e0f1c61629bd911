"""The routed experts on a CPU against a float64 loop, with activations far beyond the clamp."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the experts are vLLM's layers: install the cpu extra")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM for another platform than the CPU", allow_module_level=True)

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

import references
from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.errors import GraftError
from mtp_graft.quant import int4, mxfp4
from mtp_graft.vllm_plugin.cpu import experts as plugin
from mtp_graft.vllm_plugin.cpu.dequantize import dequantize_on_load
from mtp_graft.vllm_plugin.cpu.experts import (
    MAX_VERIFIED_TOKENS,
    clamped_experts,
    clamped_pairs,
    prompts_apart,
)
from quantized import tiny_quantization
from vllm_layers import LIMIT, load_expert, one_rank_group, routed_experts

pytestmark = pytest.mark.vllm

NUM_EXPERTS, CHOICES, HIDDEN, INTERMEDIATE = 8, 6, 256, 256
PREFIX = "model.layers.4.ffn.experts"


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def matrices(seed: int, size: int = INTERMEDIATE) -> tuple[Tensor, Tensor]:
    """Return w13 [E, 2M, D] and w2 [E, D, M]; gate and up reach about +-40."""
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(NUM_EXPERTS, 2 * size, HIDDEN, generator=generator)
    w2 = torch.randn(NUM_EXPERTS, HIDDEN, size, generator=generator)
    return w13, w2 / 16


def tokens(num_tokens: int, seed: int, choices: int = CHOICES) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs [T, D], weights [T, K] and distinct experts [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
    weights = torch.rand(num_tokens, choices, generator=generator)
    order = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(dim=1)
    return x, weights, order[:, :choices].to(torch.int32)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


COUNTS = [1, 2, 32, 75]


def in_float64(x: Tensor, w13: Tensor, w2: Tensor, *choice: Any) -> Tensor:
    return clamped_experts(x, w13.double(), w2.double(), *choice)


WAYS = {"pairs": clamped_pairs, "prompt": in_float64}
both_ways = pytest.mark.parametrize("way", WAYS)


@both_ways
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_experts_agree_with_the_loop_where_the_clamp_binds(num_tokens: int, way: str) -> None:
    (w13, w2), (x, weights, ids) = matrices(seed=0), tokens(num_tokens, seed=1)
    expected = references.clamped_experts(x, w13, w2, weights, ids, LIMIT)
    unclamped = references.clamped_experts(x, w13, w2, weights, ids, 1e9)
    assert relative_error(unclamped, expected) > 0.1, "the clamp has to bind"
    found = WAYS[way](x, w13, w2, weights, ids, LIMIT)
    rtol, atol = (1e-4, 1e-3) if way == "pairs" else (1e-12, 1e-11)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


@both_ways
@pytest.mark.parametrize(
    ("gate", "up", "expected"),
    [
        (25.0, 3.0, 10 * 3.0),  # the gate is cut above
        (-25.0, 3.0, -25 * 3.0 / (1 + torch.e**25)),  # and nowhere below
        (9.0, 30.0, 9 * 10.0),  # up is cut on both sides
        (9.0, -30.0, 9 * -10.0),
    ],
)
def test_each_side_is_clamped_as_the_reference_model_clamps(
    way: str, gate: float, up: float, expected: float
) -> None:
    w13, w2 = torch.tensor([[[gate], [up]]]), torch.ones(1, 1, 1)  # E = M = D = 1
    x, ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    found = WAYS[way](x, w13, w2, torch.ones(1, 1), ids, LIMIT)
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=2e-4, atol=0)


def test_a_prompts_tokens_do_not_depend_on_their_neighbours(threads: int) -> None:
    (w13, w2), (x, weights, ids) = matrices(seed=4), tokens(200, seed=5)
    together = in_float64(x, w13, w2, weights, ids, LIMIT).bfloat16()
    part = slice(37, 37 + MAX_VERIFIED_TOKENS + 1)
    alone = in_float64(x[part], w13, w2, weights[part], ids[part], LIMIT)
    assert torch.equal(together[part], alone.bfloat16())


@both_ways
def test_an_expert_chosen_twice_counts_twice(way: str) -> None:
    (w13, w2), (x, weights, ids) = matrices(seed=2), tokens(3, seed=3)
    ids[:, 1] = ids[:, 0]
    expected = references.clamped_experts(x, w13, w2, weights, ids, LIMIT)
    assert relative_error(WAYS[way](x, w13, w2, weights, ids, LIMIT), expected) < 1e-5


@pytest.mark.parametrize("num_tokens", [2, 3, 7, 23, 96])
def test_a_tokens_result_does_not_depend_on_its_neighbours(num_tokens: int, threads: int) -> None:
    assert torch.get_num_threads() == threads
    (w13, w2), (x, weights, ids) = matrices(seed=4), tokens(num_tokens, seed=5)
    together = clamped_pairs(x, w13, w2, weights, ids, LIMIT)
    for t in range(num_tokens):
        one = slice(t, t + 1)
        alone = clamped_pairs(x[one], w13, w2, weights[one], ids[one], LIMIT)
        assert torch.equal(together[one], alone)


# Which tokens are computed how


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that says how many tokens each request of the step has."""

    def of(*lengths: int) -> None:
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        monkeypatch.setattr(plugin, "request_bounds", lambda: bounds)

    return of


@pytest.mark.parametrize(
    ("lengths", "num_tokens", "expected"),
    [
        ((1,) * 48, 48, [(False, slice(0, 48))]),  # many streams are no prompt
        ((2, 8, 1), 11, [(False, slice(0, 11))]),
        ((9,), 9, [(True, slice(0, 9))]),  # and a short prompt is one
        ((1, 1, 40, 20), 62, [(False, slice(0, 2)), (True, slice(2, 62))]),
        ((9, 3, 9), 21, [(True, slice(0, 9)), (False, slice(9, 12)), (True, slice(12, 21))]),
        ((), 64, [(True, slice(0, 64))]),
    ],
)
def test_prompts_are_told_from_decoding_by_each_requests_tokens(
    lengths: tuple[int, ...], num_tokens: int, expected: Any, requests: Callable[..., None]
) -> None:
    requests(*lengths)
    assert list(prompts_apart(num_tokens)) == expected


def test_a_decoded_token_has_the_same_bits_beside_a_prompt(
    requests: Callable[..., None], tmp_path: Path
) -> None:
    layer, _, _ = loaded_layer("int4")
    layer.quant_method.process_weights_after_loading(layer)
    x, weights, ids = tokens(42, seed=7, choices=2)
    with one_rank_group(tmp_path):
        requests(1, 1, 40)
        together = layer.quant_method.apply(layer, x, weights, ids, None, None)
        for rows in (slice(0, 1), slice(1, 2), slice(2, 42)):
            requests(rows.stop - rows.start)
            part = x[rows], weights[rows], ids[rows]
            alone = layer.quant_method.apply(layer, *part, None, None)
            assert torch.equal(together[rows], alone)


# The stored formats, through vLLM's own layer: create, load, process, apply


def stored_parts(variant: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors that store `weight` [O, I], and float64 [O, I] what they stand for."""
    if variant == "bf16":
        return {"weight": weight.bfloat16()}, weight.bfloat16().double()
    if variant == "mxfp4":
        scale = mxfp4.group_scale(weight)
        codes = mxfp4.encode(weight, scale)
        parts = {"weight_packed": codes, "weight_scale": scale.view(torch.uint8)}
        return parts, references.decode_mxfp4(codes, scale)
    scale = int4.group_scale(weight, 128)
    words = int4.pack(int4.encode(weight, scale))
    shape = torch.tensor(weight.shape)
    parts = {"weight_packed": words, "weight_scale": scale, "weight_shape": shape}
    return parts, references.decode_int4(words, scale, 128)


def config_for(variant: str) -> CompressedTensorsConfig:
    config = tiny_quantization()
    if variant != "int4":
        config = add_head(config, 4, variant, "base")  # type: ignore[arg-type]
    return dequantize_on_load(CompressedTensorsConfig.from_config(config))


def loaded_layer(variant: str, limit: float | None = LIMIT) -> tuple[RoutedExperts, Tensor, Tensor]:
    """Return a layer with its weights loaded, and float64 w13 [E, 2M, D] and w2 [E, D, M]."""
    layer = routed_experts(config_for(variant), PREFIX, NUM_EXPERTS, HIDDEN, 128, limit)
    w13, w2 = matrices(seed=6, size=128)
    exact: dict[str, list[Tensor]] = {"w1": [], "w3": [], "w2": []}
    for e in range(NUM_EXPERTS):
        w1, w3 = w13[e].chunk(2)
        for matrix, weight in (("w1", w1), ("w3", w3), ("w2", w2[e])):
            parts, values = stored_parts(variant, weight)
            exact[matrix].append(values)
            for part, tensor in parts.items():
                load_expert(layer, e, matrix, part, tensor)
    gate_up = torch.cat((torch.stack(exact["w1"]), torch.stack(exact["w3"])), dim=1)
    return layer, gate_up, torch.stack(exact["w2"])


@pytest.mark.parametrize("variant", ["int4", "mxfp4", "bf16"])
def test_stored_experts_are_decoded_exactly_and_run_with_the_clamp(
    variant: str, requests: Callable[..., None], tmp_path: Path
) -> None:
    requests(5)
    layer, w13, w2 = loaded_layer(variant)
    method = layer.quant_method
    classes = {
        "int4": plugin.Int4Experts,
        "mxfp4": plugin.MXFP4Experts,
        "bf16": plugin.BF16Experts,
    }
    assert type(method) is classes[variant]
    method.process_weights_after_loading(layer)
    assert {name for name, _ in layer.named_parameters()} == {"w13_weight", "w2_weight"}
    assert layer.w13_weight.dtype == layer.w2_weight.dtype == torch.float32
    assert torch.equal(layer.w13_weight.double(), w13)
    assert torch.equal(layer.w2_weight.double(), w2)
    x, weights, ids = tokens(5, seed=7, choices=2)
    with one_rank_group(tmp_path):
        found = method.apply(layer, x, weights, ids, None, None)
    assert found.dtype == torch.bfloat16
    expected = references.clamped_experts(x, w13, w2, weights, ids, LIMIT)
    assert relative_error(found, expected) < 3e-3  # the output's own rounding


def test_experts_without_a_clamp_are_refused() -> None:
    layer, _, _ = loaded_layer("bf16", limit=None)
    with pytest.raises(GraftError, match="no swiglu_limit"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(("variant", "intermediate"), [("int4", 64), ("mxfp4", 48)])
def test_a_rank_whose_share_is_no_whole_group_is_refused(variant: str, intermediate: int) -> None:
    with pytest.raises(GraftError, match=rf"w2: {intermediate} inputs.*tensor parallel"):
        routed_experts(config_for(variant), PREFIX, NUM_EXPERTS, HIDDEN, intermediate)


def test_experts_of_the_bundled_model_decode_as_the_loop_does(tiny_model: Path) -> None:
    from mtp_graft.checkpoint.shards import load_tensors

    stem = "layers.2.ffn.experts.63.w2"
    names = [f"{stem}.weight_packed", f"{stem}.weight_scale"]
    packed, scale = load_tensors(tiny_model / "base", names).values()
    layer = routed_experts(config_for("int4"), PREFIX, 1, HIDDEN, 128)
    decoded = layer.quant_method.decode(packed, scale)
    assert torch.equal(decoded.double(), references.decode_int4(packed, scale, 128))
