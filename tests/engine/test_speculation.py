"""Output must not depend on speculation, nor on other requests: bit for bit at TP 1 if greedy.

Sampled tokens are others with the head, which draws more random numbers: their probabilities are
compared. With a seed they must not depend on other requests either.
"""

import math
from collections.abc import Callable
from statistics import mean, pvariance
from typing import Any

import pytest

from engine.conftest import MAX_MARGIN, Checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
LENGTHS = (3, 5, 17, 40, 64, 90, 130, 200, 256, 400)
NUM_PROMPTS, NEW_TOKENS = 50, 32
LONG = 2100  # beyond 512 compressed entries of four tokens the indexer has to choose
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, **PENALTIES},
)
ONE_LEFT: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.8, "top_p": 1e-6},
)
NUM_SAMPLED = 12
SEEDED, BESIDE = 5, 6  # the places of the sampled batches; the base's further ones score them


@pytest.fixture(scope="module")
def sampled_batches(prompts_of: Callable[..., list[int]], batches: list[Any]) -> list[Any]:
    """12 prompts that are sampled, alone; the same, each beside one that leaves nothing to chance.

    Those are 4 greedy ones, 4 with one token left to choose from, and 4 greedy with penalties.
    """
    prompts = [prompts_of(LENGTHS[i % 5], start=97 * i) for i in range(NUM_SAMPLED)]
    seeded = [SAMPLED[i % len(SAMPLED)] | {"seed": i} for i in range(NUM_SAMPLED)]
    others = batches[2]["prompts"][:4] * 3
    decided = [{}] * 4 + [*ONE_LEFT] * 2 + [PENALTIES] * 4
    alone = {"prompts": prompts, "sampling": seeded, "max_tokens": NEW_TOKENS}
    beside = {
        "prompts": taking_turns(prompts, others),
        "sampling": taking_turns(seeded, decided),
    }
    return [alone, {**alone, **beside, "together": True}]


def taking_turns(*lists: list[Any]) -> list[Any]:
    return [element for elements in zip(*lists, strict=True) for element in elements]


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
def base(
    run_engine: Callable[[Any], list[Any]],
    checkpoints: Checkpoints,
    batches: Any,
    sampled_batches: Any,
    speculative: dict[int, Any],
) -> Any:
    """The same batches without the head; then what was sampled with it, scored as prompts."""
    prompts = sampled_batches[0]["prompts"]
    scored = [
        {
            "prompts": [p + t for p, t in zip(prompts, tokens_of(run[SEEDED]), strict=True)],
            "max_tokens": 1,
            "prompt_logprobs": True,
        }
        for run in speculative.values()
    ]
    job = {"checkpoint": str(checkpoints.base), "k": 0}
    return run_engine({**job, "batches": [*batches, *sampled_batches, *scored]})


@pytest.fixture(scope="module")
def speculative(
    run_engine: Callable[[Any], list[Any]],
    checkpoints: Checkpoints,
    batches: Any,
    sampled_batches: Any,
) -> dict[int, Any]:
    job = {"checkpoint": str(checkpoints.spliced), "batches": [*batches, *sampled_batches]}
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
    for expected, actual in zip(base[3:SEEDED], speculative[k][3:SEEDED], strict=True):
        assert tokens_of(actual) == tokens_of(expected)


def test_four_requests_at_once_are_answered_as_each_alone(base: Any) -> None:
    together = [tokens for four in base[3:SEEDED] for tokens in tokens_of(four)]
    assert together == tokens_of(base[2]) == tokens_of(base[0])[:8]


@pytest.mark.parametrize("k", [1, 2])
def test_four_requests_at_once_are_drafted_as_each_alone(
    k: int, speculative: dict[int, Any]
) -> None:
    """Text alone would not show it: a drafter that misreads other requests only accepts less."""
    alone, fours = speculative[k][2], speculative[k][3:SEEDED]
    for counted in ("drafted", "accepted"):
        assert sum(four[counted] for four in fours) == alone[counted]


@pytest.mark.parametrize("k", [0, 1, 2])
def test_greedy_requests_beside_sampled_ones_are_answered_as_alone(
    k: int, base: Any, speculative: dict[int, Any]
) -> None:
    run = speculative[k] if k else base
    beside = tokens_of(run[BESIDE])[1::2]
    assert beside[:4] == tokens_of(base[2])[:4]
    assert beside[8:] == tokens_of(base[BESIDE])[17::2], "with penalties"
    assert beside[8:] != beside[:4]


@pytest.mark.parametrize("k", [1, 2])
def test_one_token_to_choose_from_is_the_most_probable(k: int, speculative: dict[int, Any]) -> None:
    for result in speculative[k][BESIDE]["results"][9:17:2]:
        for step in result["steps"]:
            assert step["own"] == step["logprobs"][0], "another than the best, or than its equal"


@pytest.mark.parametrize("k", [1, 2])
def test_a_seed_gives_the_same_beside_other_requests(k: int, speculative: dict[int, Any]) -> None:
    alone = tokens_of(speculative[k][SEEDED])
    assert tokens_of(speculative[k][BESIDE])[::2] == alone


def sampled_logprobs(run: Any) -> list[float]:
    return [step["own"] for result in run[SEEDED]["results"] for step in result["steps"]]


@pytest.mark.parametrize("k", [1, 2])
def test_sampled_tokens_are_as_probable_with_the_head(
    k: int, base: Any, speculative: dict[int, Any], measured: dict[str, Any]
) -> None:
    """Five deviations of the difference of two means; noise is twenty nats away."""
    expected, found = sampled_logprobs(base), sampled_logprobs(speculative[k])
    measured.update(base=mean(expected), head=mean(found))
    bound = 5 * math.sqrt(2 * pvariance(expected) / len(expected))
    assert abs(mean(found) - mean(expected)) < bound < 1


@pytest.mark.parametrize("k", [1, 2])
def test_the_logprobs_of_sampled_tokens_are_those_of_the_base(
    k: int, base: Any, speculative: dict[int, Any], measured: dict[str, Any]
) -> None:
    """As a prompt they are computed in another order of sums."""
    found = sampled_logprobs(speculative[k])
    scored = [r["prompt_steps"][-NEW_TOKENS:] for r in base[BESIDE + k]["results"]]
    expected = [step["own"] for steps in scored for step in steps]
    distances = [abs(f - e) for f, e in zip(found, expected, strict=True)]
    measured.update(mean=mean(distances), most=max(distances))
    assert mean(distances) < 0.05
    assert max(distances) < MAX_MARGIN
