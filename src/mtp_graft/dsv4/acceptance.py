"""How sure a measured acceptance is."""

import math

_Z_95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927); `trials` is positive."""
    rate, z2 = successes / trials, _Z_95**2
    middle = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = rate * (1 - rate) / trials + z2 / (4 * trials**2)
    half = _Z_95 * math.sqrt(spread) / (1 + z2 / trials)
    # The rate lies inside; at 0 and 1 it is an end, which rounding must not move.
    return min(rate, max(0.0, middle - half)), max(rate, min(1.0, middle + half))
