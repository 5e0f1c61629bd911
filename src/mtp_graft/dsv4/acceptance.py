"""The server's accept/advance walk, and how sure a measured acceptance is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z_95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


@dataclass(frozen=True)
class Walk:
    """Drafts made and accepted on one sequence."""

    drafts: int
    accepted: int


def walk(drafts: Sequence[int], continuation: Sequence[int]) -> Walk:
    """Count the drafts that the server makes on a greedy continuation, and those it accepts.

    `continuation` are the tokens after the prompt. The first of them comes with the prompt and
    cannot be drafted; `drafts[i]` is the head's guess at `continuation[i + 1]`, made when
    `continuation[i]` is the newest token. A hit gives two tokens in one step: the draft and the
    base's own next one.
    """
    i = made = accepted = 0
    while i + 1 < len(continuation):
        made += 1
        hit = drafts[i] == continuation[i + 1]
        accepted += hit
        i += 2 if hit else 1
    return Walk(made, accepted)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927); `trials` is positive."""
    rate, z2 = successes / trials, _Z_95**2
    middle = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = rate * (1 - rate) / trials + z2 / (4 * trials**2)
    half = _Z_95 * math.sqrt(spread) / (1 + z2 / trials)
    # The rate lies inside; at 0 and 1 it is an end, which rounding must not move.
    return min(rate, max(0.0, middle - half)), max(rate, min(1.0, middle + half))
