"""Row-wise products: a row's value is the same whatever rows are beside it."""

import pytest

pytest.importorskip("vllm", reason="the plugin's CPU package imports vLLM: install the cpu extra")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM for another platform than the CPU", allow_module_level=True)

import torch

from mtp_graft.vllm_plugin.cpu import rowwise

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, rowwise.MAX_DECODE_TOKENS])
def test_a_rows_product_does_not_depend_on_the_rows_beside_it(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 256, generator=generator)
    weight = torch.randn(96, 256, generator=generator)
    together = rowwise.linear(x, weight)
    for row in range(num_rows):
        assert torch.equal(together[row : row + 1], rowwise.linear(x[row : row + 1], weight))


@pytest.mark.parametrize("num_rows", [0, 1, rowwise.MAX_DECODE_TOKENS + 1])
def test_the_product_is_the_one_of_float64(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 256, generator=generator)
    weight = torch.randn(96, 256, generator=generator)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(rowwise.linear(x, weight).double(), expected, rtol=1e-4, atol=1e-4)
