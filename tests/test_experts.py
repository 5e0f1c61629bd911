"""What experts are calibrated on where the capture says little or nonsense."""

import pytest
import torch

from mtp_graft.dsv4.experts import expert_errors, expert_hessians, quantize_experts
from mtp_graft.errors import GraftError
from mtp_graft.recipe import QuantizeSection

INPUTS, INNER, EXPERTS = 128, 128, range(8, 10)
SETTINGS = QuantizeSection()


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {m: torch.randn(2, INNER, INPUTS, generator=generator) for m in ("w1", "w2", "w3")}


def test_an_expert_whose_inputs_are_all_zero_is_rounded_and_loses_nothing() -> None:
    original = weights()
    tokens = [[torch.zeros(3, INPUTS)], [torch.randn(300, INPUTS)]]
    hessians = expert_hessians(tokens, original, 10.0)
    quantized = quantize_experts(original, hessians, [3, 300], EXPERTS, SETTINGS)
    errors = expert_errors(original, hessians, quantized, SETTINGS.group_size)
    for matrix in original:
        for variant in ("rtn", "gptq"):
            zero, other = errors[variant][matrix]
            assert zero == 0.0
            assert 0.0 < other < 0.2


@pytest.mark.parametrize("value", [float("nan"), 3e20])
def test_inputs_that_add_up_to_no_number_are_named_and_damp_is_not_blamed(value: float) -> None:
    original = weights()
    spoilt = torch.randn(300, INPUTS)
    spoilt[7, 5] = value  # finite in the capture, but not its square
    hessians = expert_hessians([[torch.randn(300, INPUTS)], [spoilt]], original, 10.0)
    with pytest.raises(GraftError, match=r"experts\.9\.w1: its Hessian is not finite"):
        quantize_experts(original, hessians, [300, 300], EXPERTS, SETTINGS)
