"""Two ranks on the CPU, teacher-forced: sums in float64 make them choose what one chooses."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.conftest import MAX_MARGIN, Checkpoints
from workers import CORES

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(len(CORES) < 2, reason="needs two cores, one a rank"),
]


@pytest.fixture(scope="module")
def runs(
    run_engine: Callable[[Any], list[Any]],
    checkpoints: Checkpoints,
    prompts_of: Callable[..., list[int]],
) -> dict[str, Any]:
    """The base at TP 1 and TP 2, and the head at TP 2, on the same prompts."""
    prompts = [prompts_of(length, start=113 * length) for length in (5, 64, 130, 300, 700)]
    batches = [
        {"prompts": prompts, "max_tokens": 1, "prompt_logprobs": True},
        {"prompts": prompts, "max_tokens": 32},
    ]
    base = {"checkpoint": str(checkpoints.base), "k": 0, "batches": batches}
    head = {**base, "checkpoint": str(checkpoints.spliced), "k": 1, "batches": batches[1:]}
    two = {"tensor_parallel_size": 2, "cores": CORES[:2]}  # beyond this worker's own
    return {
        "tp1": run_engine(base),
        "tp2": run_engine({**base, **two}),
        "tp2_mtp": run_engine({**head, **two}),
    }


def test_two_ranks_choose_the_same_token_wherever_one_rank_is_sure(
    runs: dict[str, Any], measured: dict[str, Any]
) -> None:
    flips, sure, distances, identical = [], 0, [], 0
    for one, two in zip(runs["tp1"][0]["results"], runs["tp2"][0]["results"], strict=True):
        steps = zip(one["prompt_steps"], two["prompt_steps"], strict=True)
        for position, (alone, shared) in enumerate(steps):
            margin = alone["logprobs"][0] - alone["logprobs"][1]
            sure += margin > MAX_MARGIN
            distances.append(abs(alone["own"] - shared["own"]))
            identical += alone == shared
            if alone["tokens"][0] != shared["tokens"][0]:
                flips.append({"position": position, "margin": margin})
    measured.update(
        positions=len(distances),
        positions_with_margin=sure,
        bit_identical=identical,
        mean_abs_dlogprob=sum(distances) / len(distances),
        max_abs_dlogprob=max(distances),
        flips=len(flips),
        flips_with_margin=[flip for flip in flips if flip["margin"] > MAX_MARGIN],
    )
    assert sure > len(distances) / 3
    assert measured["flips_with_margin"] == []


def test_the_head_changes_no_token_within_two_ranks(
    runs: dict[str, Any], measured: dict[str, Any]
) -> None:
    base, head = runs["tp2"][1], runs["tp2_mtp"][0]
    measured["acceptance"] = head["accepted"] / head["drafted"]
    texts = [[result["tokens"] for result in run["results"]] for run in (base, head)]
    assert texts[0] == texts[1]
