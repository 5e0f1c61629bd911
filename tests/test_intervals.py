"""How often an interval holds the truth, counted over many simulated comparisons."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mtp_graft.bench.intervals import Array, paired_differences, paired_ratio

SIMULATIONS = 300
TRUTH = 0.3  # the log ratio of both speeds
RNG = np.random.default_rng(20261124)


def simulate(pairs: int, start_sd: float, prompt_sd: float, noise_sd: float) -> tuple[Array, Array]:
    """Return both servers' speeds, [pairs, 8] each.

    Every start of a server is a little faster or slower, every prompt gains more or less, and
    every measurement has noise of its own; the machine slows down all the while.
    """
    prompts, gains = RNG.normal(4.0, 0.5, 8), RNG.normal(TRUTH, prompt_sd, 8)
    starts = RNG.normal(0.0, start_sd, (2, pairs, 1))
    noise = RNG.normal(0.0, noise_sd, (2, pairs, 8))
    turns = np.arange(2 * pairs).reshape(pairs, 2)
    turns[1::2] = turns[1::2, ::-1]  # base, MTP, MTP, base: the drift is alike for both
    base, mtp = prompts + starts + noise - 0.002 * turns.T[..., None]
    return np.exp(mtp + gains), np.exp(base)


@pytest.mark.parametrize("pairs", [2, 4, 6])
@pytest.mark.parametrize(
    ("start_sd", "prompt_sd", "noise_sd"),
    [(0.0, 0.0, 0.05), (0.03, 0.0, 0.02), (0.0, 0.1, 0.02), (0.03, 0.05, 0.03)],
)
def test_covers_95_percent(pairs: int, start_sd: float, prompt_sd: float, noise_sd: float) -> None:
    held = 0
    for _ in range(SIMULATIONS):
        measured = simulate(pairs, start_sd, prompt_sd, noise_sd)
        low, high = paired_ratio(*measured)["interval"]
        held += low <= np.exp(TRUTH) <= high
    # 95 % within three deviations of a count out of 300.
    assert held / SIMULATIONS >= 0.95 - 3 * (0.95 * 0.05 / SIMULATIONS) ** 0.5


def test_more_servers_say_better_how_starts_vary() -> None:
    held, widths = 0, np.zeros(2)
    for _ in range(SIMULATIONS):
        speeds = RNG.normal(4.0, 0.5, 8) + RNG.normal(0.0, 0.06, (5, 2, 1))
        speeds += RNG.normal(0.0, 0.03, (5, 2, 8)) + RNG.normal(0.0, 0.1, (2, 1))  # of a round
        ours, theirs = np.exp(speeds[:2])
        found = [paired_ratio(ours, theirs, s)["interval"] for s in (None, speeds.mean(axis=2))]
        held += found[1][0] <= 1 <= found[1][1]
        widths += [high / low for low, high in found]
    assert held / SIMULATIONS >= 0.95 - 3 * (0.95 * 0.05 / SIMULATIONS) ** 0.5
    assert widths[1] < widths[0] / 2


def test_one_prompt_leaves_the_pairs_to_say_how_sure_it_is() -> None:
    low, high = paired_ratio(np.array([[1.1], [1.3]]), np.ones((2, 1)))["interval"]
    half = 12.706 * np.log(1.3 / 1.1) / 2  # Student's t with one degree of freedom
    middle = np.log(1.1 * 1.3) / 2
    assert [low, high] == pytest.approx(np.exp([middle - half, middle + half]), rel=1e-3)


def counts(hits: Sequence[int], drafts: int = 20) -> list[dict[str, Any]]:
    return [{"id": f"t{n}", "drafts": drafts, "accepted": hit} for n, hit in enumerate(hits)]


def test_a_small_gain_on_every_text_is_seen_where_separate_intervals_overlap() -> None:
    # Texts differ by far more than heads do; on each text gptq has one draft more.
    rtn = [random.Random(n).randrange(2, 19) for n in range(60)]
    found = paired_differences({"gptq": counts([h + 1 for h in rtn]), "rtn": counts(rtn)})
    assert found == {"gptq-rtn": pytest.approx([0.05, 0.05])}


def test_the_interval_is_that_of_a_slow_resampling() -> None:
    gptq = [random.Random(n).randrange(8, 15) for n in range(30)]
    rtn = [random.Random(n + 99).randrange(7, 14) for n in range(30)]
    draw = random.Random(5)
    differences = sorted(
        sum(gptq[n] - rtn[n] for n in (draw.randrange(30) for _ in range(30))) / 600
        for _ in range(4000)
    )
    given = {"gptq": counts(gptq), "rtn": counts(rtn)}
    found = paired_differences(given)
    assert found["gptq-rtn"] == pytest.approx([differences[100], differences[3899]], abs=0.006)
    assert paired_differences(given) == found


def test_heads_without_counts_and_texts_without_drafts_are_left_out() -> None:
    given = {"gptq": counts([3]), "rtn": None, "bf16": counts([3])}
    assert paired_differences(given) == {"gptq-bf16": [0.0, 0.0]}
    pair = {"gptq": counts([3, 8]), "rtn": counts([2, 9])}
    at_once = [{"id": "at once", "drafts": 0, "accepted": 0}]
    padded = {head: texts + at_once for head, texts in pair.items()}
    assert paired_differences(padded) == paired_differences(pair)
    with pytest.raises(AssertionError, match="not the same texts"):
        paired_differences({"gptq": counts([3]), "rtn": counts([3, 3])})
