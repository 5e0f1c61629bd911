"""vLLM's CPU path with our plugin, against transformers in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.conftest import MAX_MARGIN, Checkpoints
from engine.reference_model import load_reference, reference_logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
LENGTHS = (5, 130, 300, 1500)


@pytest.fixture(scope="module")
def prompts(prompts_of: Callable[..., list[int]]) -> list[list[int]]:
    return [prompts_of(length) for length in LENGTHS]


@pytest.fixture(scope="module")
def engine_batches(
    run_engine: Callable[[Any], list[Any]], checkpoints: Checkpoints, prompts: list[list[int]]
) -> list[Any]:
    """The prompts scored alone, then batched."""
    batch = {"prompts": prompts, "max_tokens": 1, "prompt_logprobs": True}
    batches = [batch, {**batch, "together": True}]
    return run_engine({"checkpoint": str(checkpoints.base), "k": 0, "batches": batches})


@pytest.fixture(scope="module")
def expected_logprobs(checkpoints: Checkpoints, prompts: list[list[int]]) -> list[torch.Tensor]:
    """What transformers gives each prompt's positions: [T, vocabulary]."""
    reference = load_reference(checkpoints.base)
    return [reference_logprobs(reference, prompt) for prompt in prompts]


@pytest.mark.parametrize("together", [False, True], ids=["alone", "batched"])
def test_every_prompt_position_agrees_with_transformers_in_float32(
    together: bool,
    engine_batches: list[Any],
    expected_logprobs: list[torch.Tensor],
    prompts: list[list[int]],
    measured: dict[str, Any],
) -> None:
    equal = sure = total = 0
    distances: list[float] = []
    results = engine_batches[together]["results"]
    for prompt, result, expected in zip(prompts, results, expected_logprobs, strict=True):
        steps = [*result["prompt_steps"], *result["steps"]]
        assert len(steps) == len(prompt)
        best = expected.topk(2).values
        margins = best[:, 0] - best[:, 1]
        choices = torch.tensor([step["tokens"][0] for step in steps])
        agree = choices == expected.argmax(-1)
        decided = margins > MAX_MARGIN
        equal += int((agree & decided).sum())
        sure += int(decided.sum())
        total += len(steps)
        following = torch.tensor(prompt[1:])
        own = torch.tensor([step["own"] for step in result["prompt_steps"]])
        distances += (own - expected[:-1].gather(1, following[:, None])[:, 0]).abs().tolist()
    measured.update(
        positions=total,
        positions_with_margin=sure,
        argmax_equal=equal / sure,
        mean_abs_dlogprob=sum(distances) / len(distances),
    )
    assert sure > total / 3, "hardly any position is decided; the comparison says nothing"
    assert equal / sure >= 0.98
