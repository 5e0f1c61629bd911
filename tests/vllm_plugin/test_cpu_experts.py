"""The routed experts on a CPU against a float64 loop, with activations far beyond the clamp."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts

import references
from mtp_graft.dsv4.variants import int4_parts
from mtp_graft.errors import GraftError
from mtp_graft.quant import int4
from mtp_graft.vllm_plugin.cpu import experts as plugin
from mtp_graft.vllm_plugin.cpu.experts import clamped_experts, clamped_pairs, prompts_apart
from vllm_plugin.layers import LIMIT, config_for, load_expert, routed_experts

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]
NUM_EXPERTS, CHOICES, HIDDEN, INTERMEDIATE = 8, 6, 256, 128
RANDOM = torch.Generator().manual_seed(0)
#: [E, 2M, D] and [E, D, M]; gate and up reach about +-40.
W13 = torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=RANDOM)
W2 = torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, generator=RANDOM) / 16
Tokens = tuple[Tensor, Tensor, Tensor]
both_ways = pytest.mark.parametrize("way", [clamped_pairs, clamped_experts])


def tokens(num_tokens: int, choices: int = CHOICES) -> Tokens:
    """Return inputs [T, D], weights [T, K] and experts [T, K], of the first token two the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
    weights = torch.rand(num_tokens, choices, generator=generator)
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :choices]
    ids[0, 1] = ids[0, 0]
    return x, weights, ids.to(torch.int32)


def compute(way: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    dtype = torch.float32 if way is clamped_pairs else torch.float64
    found: Tensor = way(x, W13.to(dtype), W2.to(dtype), weights, ids, LIMIT)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@both_ways
@pytest.mark.parametrize("num_tokens", [1, 12])
def test_experts_agree_with_the_loop_where_the_clamp_binds(num_tokens: int, way: Any) -> None:
    x, weights, ids = tokens(num_tokens)
    expected = references.clamped_experts(x, W13, W2, weights, ids, LIMIT)
    unclamped = references.clamped_experts(x, W13, W2, weights, ids, 1e9)
    assert relative_error(unclamped, expected) > 0.1, "the clamp has to bind"
    rtol, atol = (1e-4, 1e-3) if way is clamped_pairs else (1e-12, 1e-11)
    found = compute(way, x, weights, ids).double()
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@both_ways
@pytest.mark.parametrize("num_tokens", [2, 7, 48])
def test_a_token_does_not_depend_on_its_neighbours(way: Any, num_tokens: int, threads: int) -> None:
    together = compute(way, *tokens(num_tokens))
    each = zip(*(part.split(1) for part in tokens(num_tokens)), strict=True)
    alone = torch.cat([compute(way, *token) for token in each])
    assert torch.equal(together.bfloat16(), alone.bfloat16())


@pytest.mark.parametrize(
    ("lengths", "total", "expected"),
    [
        ((1,) * 48, 48, [(False, slice(0, 48))]),  # many requests are no prompt
        ((2, 8, 1), 11, [(False, slice(0, 11))]),
        ((9,), 9, [(True, slice(0, 9))]),  # and a short prompt is one
        ((1, 1, 40, 20), 62, [(False, slice(0, 2)), (True, slice(2, 62))]),
        ((9, 3, 9), 21, [(True, slice(0, 9)), (False, slice(9, 12)), (True, slice(12, 21))]),
        ((), 64, [(True, slice(0, 64))]),
    ],
)
def test_prompts_are_told_from_decoding_by_each_requests_tokens(
    lengths: Any, total: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "request_bounds", lambda: [*accumulate((0, *lengths))])
    assert list(prompts_apart(total)) == expected


def stored_parts(variant: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors that store `weight` [O, I], and [O, I] what they stand for."""
    if variant == "bf16":
        return {"weight": weight.bfloat16()}, weight.bfloat16()
    if variant == "mxfp4":
        outputs, inputs = weight.shape
        codes = torch.randint(256, (outputs, inputs // 2), generator=RANDOM).to(torch.uint8)
        scale = torch.randint(125, 127, (outputs, inputs // 32), generator=RANDOM)  # 1/4 and 1/2
        parts = {"weight_packed": codes, "weight_scale": scale.to(torch.uint8)}
        return parts, references.decode_mxfp4(*parts.values())
    scale = int4.group_scale(weight, 128)
    parts = int4_parts(int4.encode(weight, scale), scale)
    return parts, references.decode_int4(parts["weight_packed"], scale, 128)


def experts_layer(variant: str, size: int = INTERMEDIATE, **options: Any) -> RoutedExperts:
    return routed_experts(config_for(variant), 4, NUM_EXPERTS, HIDDEN, size, **options)


@pytest.mark.parametrize("variant", ["int4", "mxfp4", "bf16"])
def test_stored_experts_are_decoded_exactly(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that decodes two requests and computes the prompt of a third."""
    monkeypatch.setattr(plugin, "request_bounds", lambda: [0, 1, 2, 14])
    layer, w13, w2 = experts_layer(variant), W13.clone(), W2.clone()
    for expert in range(NUM_EXPERTS):
        w1, w3 = w13[expert].chunk(2)  # views: what is stored takes the place of what was given
        for matrix, weight in (("w1", w1), ("w3", w3), ("w2", w2[expert])):
            parts, exact = stored_parts(variant, weight)
            weight.copy_(exact)
            for part, tensor in parts.items():
                load_expert(layer, expert, matrix, part, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    assert {name for name, _ in layer.named_parameters()} == {"w13_weight", "w2_weight"}
    assert torch.equal(layer.w13_weight, w13) and torch.equal(layer.w2_weight, w2)
    x, weights, ids = tokens(14, choices=2)
    found = layer.quant_method.apply(layer, x, weights, ids, None, None)
    assert found.dtype == torch.bfloat16
    expected = references.clamped_experts(x, w13, w2, weights, ids, LIMIT)
    assert relative_error(found, expected) < 3e-3  # the output's own rounding


def test_experts_without_a_clamp_or_with_a_part_of_a_group_are_refused() -> None:
    layer = experts_layer("bf16", limit=None)
    with pytest.raises(GraftError, match="no swiglu_limit"):
        layer.quant_method.process_weights_after_loading(layer)
    for variant, size in (("int4", 64), ("mxfp4", 48)):
        with pytest.raises(GraftError, match=rf"w2: {size} inputs.*tensor parallel"):
            experts_layer(variant, size)
