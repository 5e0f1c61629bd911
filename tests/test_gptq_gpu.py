"""The Triton kernels against the code that runs on a CPU."""

import pytest
import torch

from mtp_graft.quant import int4
from mtp_graft.quant.gptq import Scale, gptq, relative_error, sweep
from test_gptq import problem

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("inputs", "outputs"), [(128, 256), (128, 70), (48, 33), (1, 5)])
def test_the_sweep_gives_the_cpus_codes(inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    columns = torch.randn(3, inputs, outputs, generator=generator)
    factor = torch.randn(3, inputs, inputs, generator=generator).mul(0.1).triu()
    factor.diagonal(dim1=1, dim2=2).abs_().add_(0.5)
    step = torch.rand(3, inputs, outputs, generator=generator).mul(0.2).add(0.1)
    on_gpu = sweep(columns.cuda(), factor.cuda(), step.cuda()).cpu()
    assert (on_gpu == sweep(columns, factor, step)).float().mean() > 0.999


def test_the_search_gives_the_cpus_scales() -> None:
    from mtp_graft.quant import gptq_triton

    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(2, 128, 300, generator=generator)
    importance = torch.rand(2, 128, generator=generator)
    expected = int4.searched_scale(columns.mT, 128, importance)
    found = gptq_triton.searched_scale(columns.cuda(), importance.cuda()).cpu()
    assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_gptq_agrees_with_the_cpu(scale: Scale) -> None:
    # A direction that all inputs share makes the error itself a matter of rounding: 2e-7 of noise
    # in such a Hessian moved it by 0.7 % on a CPU.
    weight, hessian = problem(4, 256, 512, seed=0, shared=0)
    on_cpu = gptq(weight, hessian, scale=scale)
    on_gpu = gptq(weight.cuda(), hessian.cuda(), scale=scale)
    assert (on_gpu.codes.cpu() == on_cpu.codes).float().mean() > 0.99
    errors = [
        relative_error(weight, int4.decode(q.codes.cpu(), q.scale.cpu()), hessian).mean()
        for q in (on_cpu, on_gpu)
    ]
    assert errors[1].item() == pytest.approx(errors[0].item(), rel=1e-3)
