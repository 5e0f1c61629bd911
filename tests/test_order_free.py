"""Products that do not depend on the rows beside, on the threads or on the ranks."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plugin's CPU package imports vLLM: install the cpu extra")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM for another platform than the CPU", allow_module_level=True)

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from mtp_graft.vllm_plugin.cpu import order_free
from mtp_graft.vllm_plugin.cpu.order_free import (
    MAX_DECODE_TOKENS,
    OrderFreeHead,
    OrderFreeLinear,
    add_over_ranks,
    free_from_order,
    product,
)
from vllm_layers import one_rank_group

pytestmark = pytest.mark.vllm

INPUTS, OUTPUTS = 256, 96


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank_group(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bf16(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, MAX_DECODE_TOKENS])
def test_a_decode_steps_row_has_the_bits_that_it_has_alone(num_rows: int, threads: int) -> None:
    assert torch.get_num_threads() == threads
    x, weight = bf16(num_rows, INPUTS, seed=num_rows), bf16(OUTPUTS, INPUTS, seed=1).double()
    together = product(x, weight)
    for row in range(num_rows):
        assert torch.equal(together[row : row + 1], product(x[row : row + 1], weight))
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(together.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_rows", [MAX_DECODE_TOKENS + 1, 700])
def test_a_prompts_row_is_summed_in_float64(num_rows: int, threads: int) -> None:
    x, weight = bf16(num_rows, INPUTS, seed=num_rows), bf16(OUTPUTS, INPUTS, seed=1).double()
    found = product(x, weight)
    for row in range(num_rows):
        other_order = (x[row].double() * weight.double()).flip(-1).sum(-1)
        torch.testing.assert_close(found[row], other_order, rtol=1e-12, atol=1e-12)
        assert torch.equal(found[row].bfloat16(), other_order.bfloat16())


@pytest.mark.parametrize("num_tokens", [3, MAX_DECODE_TOKENS + 1])
def test_a_tokens_streams_are_computed_like_any_row(num_tokens: int) -> None:
    x, weight = bf16(num_tokens, 4, INPUTS, seed=2), bf16(OUTPUTS, INPUTS, seed=3).double()
    found = product(x, weight)
    assert found.shape == (num_tokens, 4, OUTPUTS)
    expected = torch.stack([product(stream, weight) for stream in x.unbind(1)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_the_inputs_give_the_sum_of_one(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    x, weight = bf16(50, 32 * ranks, seed=4), bf16(OUTPUTS, 32 * ranks, seed=5).double()
    expected = product(x, weight).bfloat16()
    shares = zip(x.chunk(ranks, -1), weight.chunk(ranks, -1), strict=True)
    partial = [mine.double() @ part.double().T for mine, part in shares]
    gathered = torch.cat([p.view(torch.float32) for p in partial])

    def gather(mine: Tensor, dim: int) -> Tensor:
        assert dim == 0 and mine.dtype == torch.float32
        return gathered

    monkeypatch.setattr(order_free, "get_tensor_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(order_free, "tensor_model_parallel_all_gather", gather)
    found = []
    for rank in range(ranks):
        monkeypatch.setattr(order_free, "get_tensor_model_parallel_rank", lambda r=rank: r)
        found.append(add_over_ranks(partial[rank], torch.bfloat16))
    assert torch.equal(found[0], expected)
    assert not any(share.any() for share in found[1:])  # vLLM adds them to the whole sum


def test_only_a_layer_that_is_split_by_its_inputs_is_added_over_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added: list[Any] = []
    monkeypatch.setattr(
        order_free, "add_over_ranks", lambda sums, dtype: added.append(sums) or sums.to(dtype)
    )
    options: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16}
    for kind in (ReplicatedLinear, RowParallelLinear):
        split = {"reduce_results": False} if kind is RowParallelLinear else {}
        layer = kind(INPUTS, OUTPUTS, **split, **options)
        layer.weight.data.copy_(bf16(OUTPUTS, INPUTS, seed=6))
        free_from_order(layer)
        layer.quant_method.process_weights_after_loading(layer)
        for ranks in (1, 2):
            monkeypatch.setattr(
                order_free, "get_tensor_model_parallel_world_size", lambda n=ranks: n
            )
            for num_tokens in (2, MAX_DECODE_TOKENS + 1):
                added.clear()
                layer(bf16(num_tokens, INPUTS, seed=7))
                assert len(added) == (kind is RowParallelLinear and ranks == 2)


@pytest.mark.parametrize("num_tokens", [2, MAX_DECODE_TOKENS + 1])
def test_router_and_lm_head_are_included_and_embeddings_stay(num_tokens: int) -> None:
    model = nn.ModuleDict(
        {
            "embed": VocabParallelEmbedding(128, INPUTS, params_dtype=torch.bfloat16),
            "gate": GateLinear(
                INPUTS, OUTPUTS, out_dtype=torch.float32, params_dtype=torch.bfloat16
            ),
            "head": ParallelLMHead(128, INPUTS, params_dtype=torch.bfloat16),
        }
    )
    before = type(model["embed"].quant_method)
    free_from_order(model)
    assert type(model["embed"].quant_method) is before
    assert type(model["gate"].quant_method) is OrderFreeLinear
    assert type(model["head"].quant_method) is OrderFreeHead
    x = bf16(num_tokens, INPUTS, seed=8)
    for name in ("gate", "head"):
        layer = model[name]
        layer.weight.data.copy_(bf16(*layer.weight.shape, seed=9))
        expected = x.double() @ layer.weight.double().T
        layer.quant_method.process_weights_after_loading(layer)
        found = layer(x)[0] if name == "gate" else layer.quant_method.apply(layer, x)
        if num_tokens > MAX_DECODE_TOKENS:
            assert torch.equal(found.bfloat16(), expected.bfloat16())
        else:
            torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
