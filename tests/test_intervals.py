"""How often an interval holds the truth, counted over many simulated comparisons."""

import numpy as np
import pytest

from mtp_graft.bench.intervals import (
    bootstrap_interval,
    bootstrap_median,
    bootstrap_pooled,
    mean_interval,
    paired_ratio,
    pairs_needed,
    t_quantile,
)

SIMULATIONS = 400
RNG = np.random.default_rng(20261124)


@pytest.mark.parametrize(
    ("confidence", "dof", "expected"),  # from printed tables
    [(0.95, 1, 12.706), (0.95, 3, 3.182), (0.95, 7, 2.365), (0.6, 5, 0.920), (0.95, 1e4, 1.960)],
)
def test_quantiles_are_those_of_printed_tables(
    confidence: float, dof: float, expected: float
) -> None:
    assert t_quantile(confidence, dof) == pytest.approx(expected, abs=6e-4)


def simulate(truth: float, pairs: int, start_sd: float, prompt_sd: float, noise_sd: float):  # type: ignore[no-untyped-def]
    """Return both servers' speeds, [pairs, 8] each; `truth` is the log ratio.

    Every start of a server is a little faster or slower, every prompt gains more or less, and
    every measurement has noise of its own; the machine slows down all the while.
    """
    speeds = []
    prompts = RNG.normal(4.0, 0.5, (1, 8))
    gains = RNG.normal(truth, prompt_sd, (1, 8))
    for number in (0, 1):
        start = RNG.normal(0.0, start_sd, (pairs, 1))
        noise = RNG.normal(0.0, noise_sd, (pairs, 8))
        # base, MTP, MTP, base: the drift is alike for both over two pairs.
        turn = [2 * q + (number if q % 2 == 0 else 1 - number) for q in range(pairs)]
        drift = -0.002 * np.array(turn)[:, None]
        speeds.append(np.exp(prompts + number * gains + start + noise + drift))
    return speeds[1], speeds[0]


@pytest.mark.parametrize("truth", [0.0, 0.3])
@pytest.mark.parametrize("pairs", [2, 4, 6])
@pytest.mark.parametrize(
    ("start_sd", "prompt_sd", "noise_sd"),
    [(0.0, 0.0, 0.05), (0.03, 0.0, 0.02), (0.0, 0.1, 0.02), (0.03, 0.05, 0.03)],
)
def test_the_interval_holds_the_true_ratio_at_least_as_often_as_it_says(
    truth: float, pairs: int, start_sd: float, prompt_sd: float, noise_sd: float
) -> None:
    """Base against base is the case of a log ratio of 0: the interval must hold 1."""
    held = 0
    for _ in range(SIMULATIONS):
        ours, theirs = simulate(truth, pairs, start_sd, prompt_sd, noise_sd)
        low, high = paired_ratio(ours, theirs)["interval"]
        held += low <= np.exp(truth) <= high
    # 95 % within three deviations of a count out of 400.
    assert held / SIMULATIONS >= 0.95 - 3 * (0.95 * 0.05 / SIMULATIONS) ** 0.5


def test_resampling_prompts_alone_would_miss_what_a_start_changes() -> None:
    """Why the ratio has no bootstrap over prompts: all prompts share their server's start."""
    held = 0
    for _ in range(SIMULATIONS // 4):
        ours, theirs = simulate(0.0, 4, start_sd=0.03, prompt_sd=0.0, noise_sd=0.02)
        logs = np.log(ours / theirs).mean(axis=0)
        low, high = bootstrap_interval(8, lambda chosen, logs=logs: float(logs[chosen].mean()))
        held += low <= 0 <= high
    assert held / (SIMULATIONS // 4) < 0.8


def test_an_effect_of_2_percent_is_seen_four_times_in_five_with_the_pairs_that_are_asked_for() -> (
    None
):
    start_sd = 0.02
    pair_sd = 2**0.5 * start_sd  # two servers were started
    pairs = pairs_needed(pair_sd, 0.02)
    assert 10 < pairs < 30
    seen = 0
    for _ in range(SIMULATIONS):
        ours, theirs = simulate(np.log(1.02), pairs, start_sd, 0.0, 0.0)
        seen += paired_ratio(ours, theirs)["interval"][0] > 1
    assert 0.7 < seen / SIMULATIONS < 0.9


def test_more_spread_needs_more_pairs_and_none_needs_two() -> None:
    assert pairs_needed(0.0, 0.02) == 2
    assert pairs_needed(0.1, 0.02) > 4 * pairs_needed(0.04, 0.02)


def test_the_ratio_is_the_geometric_mean_over_pairs_and_prompts() -> None:
    ours, theirs = np.array([[2.0, 8.0], [4.0, 4.0]]), np.array([[1.0, 2.0], [2.0, 2.0]])
    found = paired_ratio(ours, theirs)
    assert found["estimate"] == pytest.approx((2 * 4 * 2 * 2) ** 0.25)
    assert found["per_pair"] == pytest.approx([8**0.5, 2.0])
    assert found["per_prompt"] == pytest.approx([2.0, 8**0.5])


def test_one_prompt_leaves_the_pairs_to_say_how_sure_it_is() -> None:
    low, high = paired_ratio(np.array([[1.1], [1.3]]), np.ones((2, 1)))["interval"]
    half = 12.706 * np.log(1.3 / 1.1) / 2
    middle = np.log(1.1 * 1.3) / 2
    assert [low, high] == pytest.approx(np.exp([middle - half, middle + half]), rel=1e-3)


def test_servers_that_never_vary_have_an_interval_without_width() -> None:
    found = paired_ratio(np.full((3, 4), 2.0), np.ones((3, 4)))
    assert found["interval"] == pytest.approx([2.0, 2.0])


def test_a_mean_of_two_values_has_students_interval_of_its_logarithm() -> None:
    found = mean_interval([1.0, 3.0])
    assert np.log(found) == pytest.approx(np.log(2) + np.array([-1, 1]) * 12.706 / 2, rel=1e-3)


def test_no_interval_of_a_speed_is_negative_and_a_narrow_one_is_students() -> None:
    low, high = mean_interval([0.0] * 7 + [800.0])  # all tokens came in one slice
    assert 0 < low < 100 < high
    assert mean_interval([99.0, 101.0, 100.0]) == pytest.approx((97.52, 102.48), abs=0.05)


@pytest.mark.parametrize("shape", [2.0, 20.0])  # of a slice: its spread is 71 %, or 22 %
def test_the_interval_of_a_speed_holds_it_about_as_often_as_it_says(shape: float) -> None:
    means = [mean_interval(RNG.gamma(shape, 1 / shape, 8)) for _ in range(SIMULATIONS)]
    assert sum(low <= 1 <= high for low, high in means) / SIMULATIONS > 0.9


def test_the_fast_bootstraps_are_those_of_a_plain_loop() -> None:
    tokens, seconds = RNG.uniform(5, 9, (3, 6)), RNG.uniform(1, 2, (3, 6))

    def pooled(chosen: np.ndarray) -> float:  # type: ignore[type-arg]
        rates = [t[chosen].sum() / s[chosen].sum() for t, s in zip(tokens, seconds, strict=True)]
        return float(np.median(rates))

    def middle(chosen: np.ndarray) -> float:  # type: ignore[type-arg]
        return float(np.median([np.median(row[chosen]) for row in seconds]))

    assert bootstrap_pooled(tokens, seconds) == pytest.approx(bootstrap_interval(6, pooled))
    assert bootstrap_median(seconds) == pytest.approx(bootstrap_interval(6, middle))
