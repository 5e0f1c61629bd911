"""Greedy output must not depend on speculation, nor on other requests: bit for bit at TP 1."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.conftest import Checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
LENGTHS = (3, 5, 17, 40, 64, 90, 130, 200, 256, 400)
NUM_PROMPTS, NEW_TOKENS = 50, 32
LONG = 2100  # beyond 512 compressed entries of four tokens the indexer has to choose


@pytest.fixture(scope="module")
def batches(prompts_of: Callable[..., list[int]]) -> list[Any]:
    """50 prompts of mixed length, alone; a long one; 8 of the 50 alone, and four at a time."""
    mixed = [prompts_of(LENGTHS[i % len(LENGTHS)], start=61 * i) for i in range(NUM_PROMPTS)]
    fours = [mixed[i : i + 4] for i in range(0, 8, 4)]
    return [
        {"prompts": mixed, "max_tokens": NEW_TOKENS},
        {"prompts": [prompts_of(LONG)], "max_tokens": NEW_TOKENS},
        {"prompts": mixed[:8], "max_tokens": NEW_TOKENS},
        *({"prompts": four, "max_tokens": NEW_TOKENS, "together": True} for four in fours),
    ]


@pytest.fixture(scope="module")
def base(run_engine: Callable[[Any], list[Any]], checkpoints: Checkpoints, batches: Any) -> Any:
    return run_engine({"checkpoint": str(checkpoints.base), "k": 0, "batches": batches})


@pytest.fixture(scope="module")
def speculative(
    run_engine: Callable[[Any], list[Any]], checkpoints: Checkpoints, batches: Any
) -> dict[int, Any]:
    job = {"checkpoint": str(checkpoints.spliced), "batches": batches}
    return {k: run_engine({**job, "k": k}) for k in (1, 2)}


def tokens_of(batch: Any) -> list[Any]:
    return [result["tokens"] for result in batch["results"]]


@pytest.mark.parametrize("k", [1, 2])
def test_greedy_tokens_are_identical_with_and_without_the_head(
    k: int, base: Any, speculative: dict[int, Any]
) -> None:
    assert len(base[0]["results"]) == NUM_PROMPTS
    assert tokens_of(speculative[k][0]) == tokens_of(base[0])


@pytest.mark.parametrize("k", [1, 2])
def test_logprobs_are_bit_identical_with_and_without_the_head(
    k: int, base: Any, speculative: dict[int, Any]
) -> None:
    assert speculative[k][0]["results"] == base[0]["results"]


def test_both_acceptance_and_rejection_were_exercised(
    speculative: dict[int, Any], measured: dict[str, Any]
) -> None:
    runs = {k: speculative[k][0] for k in (1, 2)}
    accepted = sum(run["accepted"] for run in runs.values())
    rejected = sum(run["drafted"] - run["accepted"] for run in runs.values())
    measured.update(accepted=accepted, rejected=rejected)
    measured.update({f"acceptance_k{k}": r["accepted"] / r["drafted"] for k, r in runs.items()})
    assert accepted >= 500
    assert rejected >= 500


@pytest.mark.parametrize("k", [1, 2])
def test_a_context_beyond_the_indexers_choice_is_identical_too(
    k: int, base: Any, speculative: dict[int, Any]
) -> None:
    assert tokens_of(speculative[k][1]) == tokens_of(base[1])


@pytest.mark.parametrize("k", [1, 2])
def test_four_requests_at_once_are_identical_too(
    k: int, base: Any, speculative: dict[int, Any]
) -> None:
    assert len(base[3:]) == 2
    for expected, actual in zip(base[3:], speculative[k][3:], strict=True):
        assert tokens_of(actual) == tokens_of(expected)


def test_four_requests_at_once_are_answered_as_each_alone(base: Any) -> None:
    together = [tokens for four in base[3:] for tokens in tokens_of(four)]
    assert together == tokens_of(base[2]) == tokens_of(base[0])[:8]


@pytest.mark.parametrize("k", [1, 2])
def test_four_requests_at_once_are_drafted_as_each_alone(
    k: int, speculative: dict[int, Any]
) -> None:
    """Text alone would not show it: a drafter that misreads other requests only accepts less."""
    alone, fours = speculative[k][2], speculative[k][3:]
    for counted in ("drafted", "accepted"):
        assert sum(four[counted] for four in fours) == alone[counted]
