"""What experts are calibrated on where the capture says little or nonsense."""

import pytest
import torch

from mtp_graft.dsv4.experts import GptqRules, expert_errors, expert_hessians, quantize_experts
from mtp_graft.errors import GraftError

INPUTS, INNER, EXPERTS = 128, 128, range(8, 10)
RULES = GptqRules()


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {m: torch.randn(2, INNER, INPUTS, generator=generator) for m in ("w1", "w2", "w3")}


def test_an_expert_whose_inputs_are_all_zero_is_rounded_and_loses_nothing() -> None:
    original = weights()
    rows = [[torch.zeros(3, INPUTS)], [torch.randn(300, INPUTS)]]
    hessians = expert_hessians(rows, original, 10.0)
    quantized = quantize_experts(original, hessians, [3, 300], EXPERTS, RULES)
    errors = expert_errors(original, hessians, quantized, RULES.group_size)
    for matrix in original:
        for variant in ("rtn", "gptq"):
            zero, other = errors[variant][matrix]
            assert zero == 0.0
            assert 0.0 < other < 0.2


@pytest.mark.parametrize(("value", "matrix"), [(float("nan"), "w1"), (3e20, "w1")])
def test_inputs_that_add_up_to_no_number_are_named_and_damp_is_not_blamed(
    value: float, matrix: str
) -> None:
    original = weights()
    spoilt = torch.randn(300, INPUTS)
    spoilt[7, 5] = value  # finite in the capture, but not its square
    hessians = expert_hessians([[torch.randn(300, INPUTS)], [spoilt]], original, 10.0)
    with pytest.raises(GraftError, match=rf"experts\.9\.{matrix}: the squares of its inputs"):
        quantize_experts(original, hessians, [300, 300], EXPERTS, RULES)
