"""How sure a measured speed or ratio is.

Q: pairs of server sessions, R: rounds, P: prompts, B: resamples.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
POWER = 0.8
_RESAMPLES = 2000
_SEED = 0

Array = NDArray[np.float64]


@lru_cache
def t_quantile(confidence: float, dof: float) -> float:
    """Return t so that a Student variable of `dof` >= 1 lies in [-t, t] with this probability.

    With x = sqrt(dof) tan(phi) the density is cos(phi)^(dof - 1), integrated here on a grid.
    """
    phi = np.linspace(0.0, math.pi / 2, 10_001)
    density = np.cos(phi) ** (dof - 1.0)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(dof) * math.tan(float(np.interp(confidence, mass / mass[-1], phi)))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % interval of the positive mean of two or more independent values.

    It is Student's, of the mean's logarithm: no bound is negative, as no speed is. The logarithm's
    error is the mean's relative error (delta method), so a value may be 0.
    """
    middle = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) / middle
    factor = math.exp(t_quantile(CONFIDENCE, len(values) - 1) * error)
    return middle / factor, middle * factor


def bootstrap_interval(
    num_prompts: int, statistic: Callable[[NDArray[np.int64]], float]
) -> tuple[float, float]:
    """Return the 95 % percentile interval of `statistic` over resampled prompts (Efron 1979).

    `statistic` gets prompt numbers [P], drawn with replacement. The seed is fixed: the same
    measurements have the same interval. It covers the choice of prompts and nothing else.
    """
    return _percentiles(np.array([statistic(draw) for draw in _draws(num_prompts)]))


def bootstrap_pooled(numerators: Array, denominators: Array) -> tuple[float, float]:
    """Return such an interval of the median over rounds of sum / sum; both are [R, P]."""
    draws = _draws(numerators.shape[1])
    with np.errstate(invalid="ignore"):  # 0 / 0 where no drawn prompt has any: left out below
        rates = numerators[:, draws].sum(axis=2) / denominators[:, draws].sum(axis=2)  # [R, B]
    return _percentiles(np.median(rates, axis=0))


def bootstrap_median(values: Array) -> tuple[float, float]:
    """Return such an interval of the median over rounds of the median over prompts, of [R, P]."""
    return _percentiles(np.median(np.median(values[:, _draws(values.shape[1])], axis=2), axis=0))


def _draws(num_prompts: int) -> NDArray[np.int64]:
    """Return prompt numbers drawn with replacement, [B, P]."""
    return np.random.default_rng(_SEED).integers(num_prompts, size=(_RESAMPLES, num_prompts))


def _percentiles(found: Array) -> tuple[float, float]:
    low, high = np.nanquantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def paired_ratio(ours: Array, theirs: Array) -> dict[str, Any]:
    """Return the ratio ours / theirs of positive measurements [Q, P], with a 95 % interval.

    The estimate is the geometric mean over pairs and prompts. Both are samples: a server that is
    started again is a little faster or slower for all prompts, and prompts differ in what they
    gain. The variance is that of the crossed random-effects model, var(pair means) / Q +
    var(prompt means) / P less the residual that both contain, never below the larger of the two;
    degrees of freedom after Satterthwaite (1946).
    """
    logs = np.log(ours) - np.log(theirs)  # [Q, P]
    num_pairs, num_prompts = logs.shape
    assert num_pairs > 1, "one pair says nothing about another start of the servers"
    per_pair = logs.mean(axis=1)  # [Q]
    variance, dof = _crossed_variance(logs)
    half = t_quantile(CONFIDENCE, dof) * math.sqrt(variance)
    middle = float(logs.mean())
    pair_sd = float(per_pair.std(ddof=1))
    return {
        "estimate": math.exp(middle),
        "interval": [math.exp(middle - half), math.exp(middle + half)],
        "confidence": CONFIDENCE,
        "pairs": num_pairs,
        "prompts": num_prompts,
        "per_pair": np.exp(per_pair).tolist(),
        "per_prompt": np.exp(logs.mean(axis=0)).tolist(),
        "pair_sd": pair_sd,
        "pairs_for_2_percent": pairs_needed(pair_sd, 0.02),
    }


def _crossed_variance(logs: Array) -> tuple[float, float]:
    """Return the variance of the mean of `logs` [Q, P], and its degrees of freedom."""
    num_pairs, num_prompts = logs.shape
    of_pairs = float(logs.mean(axis=1).var(ddof=1)) / num_pairs
    if num_prompts == 1:
        return of_pairs, num_pairs - 1.0
    of_prompts = float(logs.mean(axis=0).var(ddof=1)) / num_prompts
    residual = logs - logs.mean(axis=1, keepdims=True) - logs.mean(axis=0) + logs.mean()
    dofs = (num_pairs - 1, num_prompts - 1, (num_pairs - 1) * (num_prompts - 1))
    shared = float((residual**2).sum()) / dofs[2] / logs.size
    variance = max(of_pairs, of_prompts, of_pairs + of_prompts - shared)
    parts = zip((of_pairs, of_prompts, shared), dofs, strict=True)
    spread = sum(part**2 / dof for part, dof in parts)
    # Where nothing varies there is no error, whatever the degrees of freedom.
    dof = variance**2 / spread if spread else 1.0
    return variance, max(1.0, dof)


def pairs_needed(pair_sd: float, effect: float) -> int:
    """Return the pairs of sessions that show a change by `effect` (0.02: 2 %) four times in five.

    The smallest n with (t(0.975, n - 1) + t(0.8, n - 1)) * pair_sd / sqrt(n) <= log(1 + effect),
    `pair_sd` being the standard deviation of a pair's log ratio.
    """
    wanted = math.log1p(effect)

    def shows(n: int) -> bool:
        # A one-sided point at 0.8 is the two-sided one at 0.6.
        quantiles = t_quantile(CONFIDENCE, n - 1) + t_quantile(2 * POWER - 1, n - 1)
        return quantiles * pair_sd / math.sqrt(n) <= wanted

    low, high = 2, 2
    while not shows(high):
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle + 1, high)
    return high
