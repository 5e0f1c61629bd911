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
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from mtp_graft.vllm_plugin.cpu import order_free
from mtp_graft.vllm_plugin.cpu.order_free import (
    MAX_ROWS,
    MIN_ROWS,
    OrderFreeHead,
    OrderFreeLinear,
    add_over_ranks,
    free_from_order,
    in_blocks,
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


def loaded(kind: type[LinearBase], inputs: int, outputs: int) -> LinearBase:
    """Return a layer as the plugin serves it, its weight random and prepared for the kernels."""
    options: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16}
    split = {"reduce_results": False} if kind is RowParallelLinear else {}
    layer = kind(inputs, outputs, **split, **options)
    layer.weight.data.copy_(bf16(outputs, inputs, seed=6))
    free_from_order(layer)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("kind", [ReplicatedLinear, RowParallelLinear])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 640), (128, 8192), (1024, 256)])
def test_a_row_has_the_same_bits_in_any_number_of_rows(
    kind: type[LinearBase], inputs: int, outputs: int, threads: int
) -> None:
    assert torch.get_num_threads() == threads
    layer, x = loaded(kind, inputs, outputs), bf16(192, inputs, seed=1)
    alone = torch.cat([layer(row)[0] for row in x.split(1)])
    exact = x.double() @ bf16(outputs, inputs, seed=6).double().T
    torch.testing.assert_close(alone.double(), exact, rtol=1e-2, atol=1e-2)
    for num_rows in (2, 4, 5, MIN_ROWS, MAX_ROWS, MAX_ROWS + 1, 48, 96, 192):
        together = torch.cat([layer(rows)[0] for rows in x.split(num_rows)])
        assert torch.equal(together, alone), num_rows


@pytest.mark.parametrize("num_rows", [0, 1, 31, 33, 65, 2017])
def test_kernels_get_blocks_of_the_wanted_sizes_and_every_row_once(num_rows: int) -> None:
    sizes: list[int] = []

    def kernel(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows + 1

    x = torch.arange(num_rows * 4.0).view(num_rows, 4)
    assert torch.equal(in_blocks(kernel, x), x + 1)
    assert all(size <= MAX_ROWS and size % MIN_ROWS == 0 for size in sizes)


@pytest.mark.parametrize("num_tokens", [3, 50])
def test_a_tokens_streams_are_computed_like_any_row(num_tokens: int) -> None:
    layer, x = loaded(ReplicatedLinear, INPUTS, OUTPUTS), bf16(num_tokens, 4, INPUTS, seed=2)
    found = layer(x)[0]
    assert found.shape == (num_tokens, 4, OUTPUTS)
    assert torch.equal(found, torch.stack([layer(s)[0] for s in x.unbind(1)], dim=1))


def test_inputs_that_ranks_share_are_summed_in_float64(threads: int) -> None:
    layer, x = loaded(RowParallelLinear, INPUTS, OUTPUTS), bf16(50, INPUTS, seed=3)
    weight = bf16(OUTPUTS, INPUTS, seed=6).double()
    other_order = torch.stack([(row * weight).flip(-1).sum(-1) for row in x.double()])
    assert torch.equal(layer(x)[0], other_order.bfloat16())


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_the_inputs_give_the_sum_of_one(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    x, weight = bf16(50, 32 * ranks, seed=4), bf16(OUTPUTS, 32 * ranks, seed=5).double()
    expected = (x.double() @ weight.T).bfloat16()
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
    for kind in (ReplicatedLinear, RowParallelLinear):
        layer = loaded(kind, INPUTS, OUTPUTS)
        added.clear()
        layer(bf16(3, INPUTS, seed=7))
        assert len(added) == (kind is RowParallelLinear)


@pytest.mark.parametrize("num_tokens", [2, 50])
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
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
