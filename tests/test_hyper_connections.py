"""Hyper-connections of a token alone and beside others: the same bits, and the right ones."""

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="the operation is vLLM's: install the cpu extra")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM for another platform than the CPU", allow_module_level=True)

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.mhc.torch import mhc_pre_torch
from vllm.model_executor.layers.mhc import MHCPreOp

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.cpu.hyper_connections import RowwiseMHCPre, compute_rowwise

pytestmark = pytest.mark.vllm

STREAMS, HIDDEN = 4, 256
PARTS = ("post", "comb", "layer input")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """With one thread the stock kernel has nothing to divide differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def operation(kind: type[MHCPreOp]) -> MHCPreOp:
    with set_current_vllm_config(VllmConfig()):
        return kind()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixes = 2 * STREAMS + STREAMS**2
    return {
        "fn": torch.randn(mixes, STREAMS * HIDDEN, generator=generator) / 32,
        "hc_scale": 1 + torch.randn(3, generator=generator),
        "hc_base": torch.randn(mixes, generator=generator),
    }


SETTINGS = {
    "rms_eps": 1e-6,
    "hc_pre_eps": 1e-6,
    "hc_sinkhorn_eps": 1e-6,
    "hc_post_mult_value": 2.0,
    "sinkhorn_repeat": 20,
}


def streams(num_tokens: int) -> Tensor:
    """Return residual streams [T, 4, D]."""
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, STREAMS, HIDDEN, generator=generator).bfloat16()


def parts_that_differ_alone(op: MHCPreOp, residual: Tensor, weights: dict[str, Tensor]) -> set[str]:
    """Return the outputs that are not the same bits for a token alone and beside the others."""
    together = op(residual=residual, **weights, **SETTINGS)
    differing = set()
    for t in range(residual.shape[0]):
        alone = op(residual=residual[t : t + 1], **weights, **SETTINGS)
        for part, one, all_ in zip(PARTS, alone, together, strict=True):
            if not torch.equal(one, all_[t : t + 1]):
                differing.add(part)
    return differing


@pytest.mark.parametrize("num_tokens", [2, 3, 5, 16, 32, 33, 96])
def test_a_token_alone_and_beside_others_gives_the_same_bits(
    num_tokens: int, weights: dict[str, Tensor]
) -> None:
    op = operation(RowwiseMHCPre)
    assert parts_that_differ_alone(op, streams(num_tokens), weights) == set()


def test_the_stock_kernel_does_not_or_this_override_can_go(weights: dict[str, Tensor]) -> None:
    op = operation(MHCPreOp)
    differing = [parts_that_differ_alone(op, streams(n), weights) for n in (2, 3, 5, 16, 32)]
    if not any(differing):
        pytest.skip(
            f"vLLM's own kernel gave the same bits with {torch.get_num_threads()} threads; "
            "if that holds everywhere, hyper_connections.py is not needed any more"
        )
    assert set.union(*differing) >= {"comb"}


@pytest.mark.parametrize("num_tokens", [1, 7, 32, 70])
def test_result_is_that_of_vllms_plain_reference(
    num_tokens: int, weights: dict[str, Tensor]
) -> None:
    residual = streams(num_tokens)
    found = operation(RowwiseMHCPre)(residual=residual, **weights, **SETTINGS)
    expected = mhc_pre_torch(residual, **weights, **SETTINGS)
    for part, ours, theirs in zip(PARTS, found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        rtol, atol = (8e-3, 1e-3) if part == "layer input" else (1e-5, 1e-6)
        torch.testing.assert_close(ours, theirs.view_as(ours), rtol=rtol, atol=atol)


def test_outputs_have_the_stock_operations_shapes(weights: dict[str, Tensor]) -> None:
    for num_tokens in (1, 3, 33):
        outputs = [
            operation(kind)(residual=streams(num_tokens), **weights, **SETTINGS)
            for kind in (RowwiseMHCPre, MHCPreOp)
        ]
        shapes = [[(part.shape, part.dtype) for part in output] for output in outputs]
        assert shapes[0] == shapes[1]


def test_every_layer_of_a_model_gets_the_override_and_nothing_else_changes() -> None:
    class Layer(nn.Module):
        def __init__(self, op: nn.Module) -> None:
            super().__init__()
            self.mhc_pre = op

    other = nn.Identity()
    model = nn.ModuleList([Layer(operation(MHCPreOp)), nn.Sequential(Layer(operation(MHCPreOp)))])
    model.append(Layer(other))
    with set_current_vllm_config(VllmConfig()):
        compute_rowwise(model)
    assert isinstance(model[0].mhc_pre, RowwiseMHCPre)
    assert isinstance(model[1][0].mhc_pre, RowwiseMHCPre)
    assert model[2].mhc_pre is other


def test_a_model_without_hyper_connections_is_an_error() -> None:
    with pytest.raises(GraftError, match="no mhc_pre"):
        compute_rowwise(nn.Sequential(nn.Identity()))
