"""Four engines on the same prompts: the base, the head with k = 1 and 2, and the head on two ranks.

What a token is must not depend on speculation, nor on other requests: bit for bit on one rank.
Sampled tokens are others with the head, which draws more random numbers: their probabilities are
compared. With a seed they must not depend on other requests either.
"""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, pvariance
from typing import Any

import pytest

from engine.conftest import MAX_MARGIN, Batches, RunEngine
from workers import CORES

pytestmark = [pytest.mark.vllm, pytest.mark.serves, pytest.mark.slow]
LENGTHS = (3, 5, 17, 40, 64, 90, 130, 200, 256, 400)
NUM_PROMPTS, NEW_TOKENS = 20, 24
LONG = 2100  # beyond 512 compressed entries of four tokens the indexer has to choose
NUM_SAMPLED = 12
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, **PENALTIES},
)
ONE_LEFT = {"temperature": 1.0, "top_k": 1}, {"temperature": 0.8, "top_p": 1e-6}
both_k = pytest.mark.parametrize("k", [1, 2])


def taking_turns(*lists: list[Any]) -> list[Any]:
    return [element for elements in zip(*lists, strict=True) for element in elements]


@pytest.fixture(scope="module")
def batches(prompts_of: Callable[..., list[int]]) -> Batches:
    """Greedy and sampled prompts, each alone and together with others.

    Beside each sampled prompt is one that leaves nothing to chance: 4 greedy ones, 4 with one token
    left to choose from, and 4 greedy ones with penalties.
    """
    mixed = [prompts_of(LENGTHS[i % len(LENGTHS)], start=61 * i) for i in range(NUM_PROMPTS)]
    sampled = [prompts_of(LENGTHS[i % 5], start=97 * i) for i in range(NUM_SAMPLED)]
    seeded = [SAMPLED[i % len(SAMPLED)] | {"seed": i} for i in range(NUM_SAMPLED)]
    decided = [{}] * 4 + [*ONE_LEFT] * 2 + [PENALTIES] * 4
    both = taking_turns(sampled, mixed[:4] * 3), taking_turns(seeded, decided)
    prompts: dict[str, Any] = {
        "eight": {"prompts": mixed[:8]},
        "mixed": {"prompts": mixed[8:], "together": True},
        "eight together": {"prompts": mixed[:8], "together": True},
        "long": {"prompts": [prompts_of(LONG)]},
        "sampled": {"prompts": sampled, "sampling": seeded},
        "sampled beside decided": {"prompts": both[0], "sampling": both[1], "together": True},
    }
    return {name: {**batch, "max_tokens": NEW_TOKENS} for name, batch in prompts.items()}


@pytest.fixture(scope="module")
def speculative(run_engine: Any, spliced: Any, batches: Batches) -> dict[int, Batches]:
    return {k: run_engine(spliced["bf16"], batches, k) for k in (1, 2)}


@pytest.fixture(scope="module")
def scored(batches: Batches, speculative: dict[int, Batches], prompts_of: Any) -> Batches:
    """Texts, and what was sampled with the head, whose every token is scored."""
    prompts = {"texts": [prompts_of(length, start=113 * length) for length in (64, 300, 700)]}
    for k, run in speculative.items():
        pairs = zip(batches["sampled"]["prompts"], tokens_of(run["sampled"]), strict=True)
        prompts[f"k = {k}"] = [prompt + tokens for prompt, tokens in pairs]
    more = {"max_tokens": 1, "prompt_logprobs": True}
    return {name: {"prompts": texts, **more} for name, texts in prompts.items()}


@pytest.fixture(scope="module")
def base(run_engine: Any, tiny_base: Path, batches: Batches, scored: Batches) -> Batches:
    """The same batches without the head, but for the sampled ones alone; then what is scored."""
    return run_engine(tiny_base, {n: batches[n] for n in batches if n != "sampled"} | scored)


def tokens_of(batch: Any) -> list[list[int]]:
    return [result["tokens"] for result in batch["results"]]


@both_k
@pytest.mark.parametrize("name", ["eight", "mixed", "eight together", "long"])
def test_greedy_lossless(name: str, k: int, base: Batches, speculative: dict[int, Batches]) -> None:
    assert speculative[k][name]["results"] == base[name]["results"]


def test_drafts_hit_and_miss(speculative: dict[int, Batches], measured: dict[str, Any]) -> None:
    runs = {k: run["mixed"] for k, run in speculative.items()}
    measured.update({f"acceptance_k{k}": r["accepted"] / r["drafted"] for k, r in runs.items()})
    assert all(run["accepted"] >= 60 for run in runs.values())
    assert all(run["drafted"] - run["accepted"] >= 30 for run in runs.values())


def test_requests_together_are_as_if_alone(base: Batches, speculative: dict[int, Batches]) -> None:
    """Text alone would not show a drafter that misreads other requests: it only accepts less."""
    for found in (base, *speculative.values()):
        assert found["eight together"] == found["eight"]


@pytest.mark.parametrize("k", [0, 1, 2])
def test_greedy_same_beside_sampled(k: int, base: Batches, speculative: dict[int, Batches]) -> None:
    run = speculative[k] if k else base
    beside = tokens_of(run["sampled beside decided"])[1::2]
    assert beside[:4] == tokens_of(base["eight"])[:4]
    assert beside[8:] == tokens_of(base["sampled beside decided"])[17::2], "with penalties"
    assert beside[8:] != beside[:4]


@both_k
def test_one_token_left_is_the_most_probable(k: int, speculative: dict[int, Batches]) -> None:
    for result in speculative[k]["sampled beside decided"]["results"][9:17:2]:
        for step in result["steps"]:
            assert step["own"] == step["logprobs"][0], "another than the best, or than its equal"


@both_k
def test_a_seed_gives_the_same_beside_others(k: int, speculative: dict[int, Batches]) -> None:
    alone = tokens_of(speculative[k]["sampled"])
    assert tokens_of(speculative[k]["sampled beside decided"])[::2] == alone


def sampled_logprobs(results: list[Any]) -> list[float]:
    return [step["own"] for result in results for step in result["steps"]]


@both_k
def test_as_probable(k: int, base: Batches, speculative: dict[int, Batches], measured: Any) -> None:
    """Five deviations of the difference of two means; noise is twenty nats away.

    As a prompt, tokens are computed in another order of sums.
    """
    expected = sampled_logprobs(base["sampled beside decided"]["results"][::2])
    found = sampled_logprobs(speculative[k]["sampled"]["results"])
    bound = 5 * math.sqrt(2 * pvariance(expected) / len(expected))
    assert abs(mean(found) - mean(expected)) < bound < 1
    results = base[f"k = {k}"]["results"]
    told = [step["own"] for r in results for step in r["prompt_steps"][-NEW_TOKENS:]]
    distances = [abs(f - e) for f, e in zip(found, told, strict=True)]
    measured.update(base=mean(expected), head=mean(found), most=max(distances))
    assert mean(distances) < 0.05
    assert max(distances) < MAX_MARGIN


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores, one a rank")
def test_two_ranks_choose_the_same_token_wherever_one_rank_is_sure(
    run_engine: RunEngine, spliced: dict[str, Path], batches: Batches, scored: Batches,
    base: Batches, measured: dict[str, Any],
) -> None:  # fmt: skip
    """Prompts, whose sums are in float64; a text may part where a router hesitates."""
    asked = {"eight": batches["eight together"], "texts": scored["texts"]}
    cores = CORES[:2]  # beyond this worker's own
    two = run_engine(spliced["bf16"], asked, k=1, tensor_parallel_size=2, cores=cores)
    pairs = [
        (alone, shared)
        for one, other in zip(base["texts"]["results"], two["texts"]["results"], strict=True)
        for alone, shared in zip(one["prompt_steps"], other["prompt_steps"], strict=True)
    ]
    parted = [a["logprobs"] for a, b in pairs if a["tokens"][0] != b["tokens"][0]]
    flips = [best - second for best, second in parted]
    acceptance = two["eight"]["accepted"] / two["eight"]["drafted"]
    same = sum(map(list.__eq__, tokens_of(two["eight"]), tokens_of(base["eight"])))
    measured.update(positions=len(pairs), flips=flips, acceptance=acceptance, same_texts=same)
    assert all(margin < MAX_MARGIN for margin in flips)
    assert acceptance > 0.5
    assert same >= 6
