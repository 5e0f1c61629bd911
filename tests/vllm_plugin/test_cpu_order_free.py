"""A token's bits do not depend on the tokens beside it, on the threads or on the ranks.

The attention's own projection is for `engine/test_engines.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.mhc.torch import mhc_pre_torch
from vllm.model_executor.layers import vocab_parallel_embedding as embedding
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.mhc import MHCPreOp
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.cpu import order_free
from mtp_graft.vllm_plugin.cpu.order_free import MAX_ROWS, MIN_ROWS, free_from_order

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]
STREAMS, HIDDEN, MIXES = 4, 256, 24
BF16 = torch.bfloat16
Result = tuple[Tensor, ...]
#: What is computed of a token's inputs [T, ...], and the same exactly.
Layer = tuple[Callable[[Tensor], Result], Callable[[Tensor], Result]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def freed(module: nn.Module) -> Any:
    """Return `module` with its layers replaced, as the only one of a model besides what must be."""
    block = nn.Module()
    block.mhc_pre = MHCPreOp()
    attention = DeepseekV4CPUAttention.__new__(DeepseekV4CPUAttention)
    nn.Module.__init__(attention)
    free_from_order(nn.ModuleList([module, block, attention]))
    return module


def product(layer: Any) -> Layer:
    """The layer as the plugin serves it, its weight random and prepared for the kernels."""
    layer.weight.data.copy_(randn(*layer.weight.shape, seed=6))
    weight = layer.weight.data.double()
    freed(layer).quant_method.process_weights_after_loading(layer)
    apply = partial(layer.quant_method.apply, layer)
    return lambda x: (apply(x),), lambda x: (x.double() @ weight.T,)


def linear(kind: Any, inputs: int, outputs: int, **options: Any) -> Layer:
    return product(kind(inputs, outputs, bias=False, params_dtype=BF16, **options))


def hyper_connection() -> Layer:
    op = order_free.OrderFreeMHCPre()
    fn, scale = randn(MIXES, STREAMS * HIDDEN) / 32, 1 + randn(3)
    weights = {"fn": fn, "hc_scale": scale, "hc_base": randn(MIXES, seed=1)}
    epsilons = dict.fromkeys(("rms_eps", "hc_pre_eps", "hc_sinkhorn_eps"), 1e-6)
    settings = weights | epsilons | {"hc_post_mult_value": 2.0, "sinkhorn_repeat": 20}

    def streams(x: Tensor) -> Tensor:
        return x.repeat(1, STREAMS).view(-1, STREAMS, HIDDEN)

    return lambda x: op(streams(x), **settings), lambda x: mhc_pre_torch(streams(x), **settings)


LAYERS: dict[str, Callable[[], Layer]] = {
    "wide": lambda: linear(ReplicatedLinear, HIDDEN, 8192),
    "shared inputs": lambda: linear(RowParallelLinear, HIDDEN, 256, reduce_results=False),
    "router": lambda: product(GateLinear(HIDDEN, 96, out_dtype=torch.float32, params_dtype=BF16)),
    "LM head": lambda: product(embedding.ParallelLMHead(128, HIDDEN, params_dtype=BF16)),
    "hyper-connection": hyper_connection,
}
_KERNELS = [pytest.mark.serves]  # of DeepSeek-V4 alone


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=_KERNELS * (n == "hyper-connection")) for n in LAYERS]
)
@pytest.mark.usefixtures("threads")
def test_a_token_has_the_same_bits_alone_and_beside_others(name: str) -> None:
    (compute, exact), x = LAYERS[name](), randn(96, HIDDEN, seed=1).to(BF16)

    def in_steps_of(num_rows: int) -> Result:
        steps = [compute(rows) for rows in x.split(num_rows)]
        return tuple(map(torch.cat, zip(*steps, strict=True)))

    alone = in_steps_of(1)
    for found, expected in zip(alone, exact(x), strict=True):
        assert torch.allclose(found.double(), expected.view_as(found).double(), 1e-2, 1e-2)
    for num_rows in (2, 4, 5, MIN_ROWS, MAX_ROWS, MAX_ROWS + 1, 48, 96):
        assert all(map(torch.equal, in_steps_of(num_rows), alone)), num_rows


@pytest.mark.parametrize("num_rows", [0, 1, 31, 33, 65, 2017])
def test_kernels_get_blocks_of_the_wanted_sizes_and_every_row_once(num_rows: int) -> None:
    sizes: list[int] = []

    def kernel(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows + 1

    x = torch.arange(num_rows * 8.0).view(num_rows, 2, 4)
    assert torch.equal(order_free.in_blocks(kernel, x), x + 1)
    assert all(size <= MAX_ROWS and size % MIN_ROWS == 0 for size in sizes)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_sum_of_one_rank(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    x, weight = randn(50, 32 * ranks).to(BF16), randn(96, 32 * ranks, seed=5).to(BF16).double()
    shares = zip(x.chunk(ranks, -1), weight.chunk(ranks, -1), strict=True)
    partial_sums = [mine.double() @ part.T for mine, part in shares]
    gathered = torch.cat([sums.view(torch.float32) for sums in partial_sums])
    ranked = order_free.distributed
    monkeypatch.setattr(ranked, "get_tensor_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(ranked, "tensor_model_parallel_all_gather", lambda *_, **__: gathered)
    found = []
    for rank, sums in enumerate(partial_sums):
        monkeypatch.setattr(ranked, "get_tensor_model_parallel_rank", lambda r=rank: r)
        found.append(order_free.add_over_ranks(sums, BF16))
    assert torch.equal(found[0], (x.double() @ weight.T).to(BF16))
    assert not any(share.any() for share in found[1:])  # vLLM adds them to the whole sum


def test_every_layer_of_a_model_is_freed_and_embeddings_stay() -> None:
    embed, lm_head = embedding.VocabParallelEmbedding, embedding.ParallelLMHead
    before = type((layer := embed(128, HIDDEN, params_dtype=BF16)).quant_method)
    assert type(freed(layer).quant_method) is before
    assert type(freed(lm_head(128, HIDDEN)).quant_method) is order_free.OrderFreeHead
    assert type(freed(GateLinear(HIDDEN, 96)).quant_method) is order_free.OrderFreeLinear
    with pytest.raises(GraftError, match="no \\['attention', 'hyper-connections'\\]"):
        free_from_order(nn.Sequential(nn.Identity()))
