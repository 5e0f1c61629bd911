"""vLLM's speculative decoding counters, read from its Prometheus page."""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, NamedTuple, Self

from prometheus_client.parser import text_string_to_metric_families

from mtp_graft.errors import translated

_PREFIX = "vllm:spec_decode_num_"


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927); `trials` is positive."""
    from scipy import stats

    low, high = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return float(low), float(high)


class Step(NamedTuple):
    """How many tokens one step drafted, and how many of them, from the first on, it accepted."""

    drafted: int
    accepted: int


@dataclass(frozen=True)
class SpecDecodeCounters:
    """Drafts and accepted tokens since the server started, or between two readings.

    `accepted_per_position[i]` counts the steps whose first i + 1 drafts were all accepted;
    `tried_per_position[i]` those whose first i were and that had one more. None: all that could.
    """

    num_drafts: int  # steps with drafts
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: Sequence[int]
    tried_per_position: Sequence[int] | None = None

    def __sub__(self, earlier: Self) -> "SpecDecodeCounters":
        return _combine(operator.sub, self, earlier)

    @property
    def acceptance(self) -> float | None:
        """Return accepted over drafted tokens (0..1), or None if nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    @property
    def k(self) -> int:
        """Return how many tokens a step drafts."""
        return len(self.accepted_per_position)


def total(counters: Sequence[SpecDecodeCounters]) -> SpecDecodeCounters:
    """Return the sum of one or more counters of the same k."""
    return _combine(lambda *each: sum(each), *counters)


def _combine(how: Callable[..., int], *counters: SpecDecodeCounters) -> SpecDecodeCounters:
    plain = ((c.num_drafts, c.num_draft_tokens, c.num_accepted_tokens) for c in counters)
    positions = zip(*(c.accepted_per_position for c in counters), strict=True)
    steps, drafted, accepted = map(how, *plain)
    return SpecDecodeCounters(steps, drafted, accepted, tuple(starmap(how, positions)))


def count_steps(steps: Sequence[Step]) -> SpecDecodeCounters:
    """Return counters of steps, the last of a text among them, which may have fewer drafts."""
    places = range(max((step.drafted for step in steps), default=0))
    return SpecDecodeCounters(
        len(steps),
        sum(step.drafted for step in steps),
        sum(step.accepted for step in steps),
        tuple(sum(step.accepted > place for step in steps) for place in places),
        tuple(sum(step.accepted >= place < step.drafted for step in steps) for place in places),
    )


def parse_spec_decode(page: str) -> SpecDecodeCounters | None:
    """Sum the counters of all engines on a metrics page; None if the server does not draft."""
    totals, positions = Counter[str](), Counter[int]()
    with translated("not vLLM's metrics", ValueError, KeyError, then="; is a vLLM server there?"):
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                name = sample.name.removeprefix(_PREFIX)
                if name == "accepted_tokens_per_pos_total":
                    positions[int(sample.labels["position"])] += int(sample.value)
                elif name != sample.name:
                    totals[name] += int(sample.value)
    if "drafts_total" not in totals:
        return None
    return SpecDecodeCounters(
        totals["drafts_total"],
        totals["draft_tokens_total"],
        totals["accepted_tokens_total"],
        tuple(positions[position] for position in sorted(positions)),
    )


def drafting_result(counters: SpecDecodeCounters | None) -> dict[str, Any]:
    """Return what a result says of its drafts; every key is null for a server that does not draft.

    Keys: `k`; `steps` (with drafts); `accepted_by_position` (the steps that accepted at least so
    many drafts); `acceptance_by_position` (each given that all before it were accepted; null where
    no step got there) with its `_interval` (95 %, Wilson, which takes steps as independent);
    `acceptance_length` (tokens a step, its own included; null without a step).
    """
    if counters is None:
        return dict.fromkeys(drafting_result(SpecDecodeCounters(0, 0, 0, ())))
    steps, accepted = counters.num_drafts, counters.accepted_per_position
    reached = [*zip(counters.tried_per_position or (steps, *accepted), accepted, strict=False)]
    return {
        "k": counters.k,
        "steps": steps,
        "accepted_by_position": list(accepted),
        "acceptance_by_position": [a / tried if tried else None for tried, a in reached],
        "acceptance_by_position_interval": [
            list(wilson_interval(a, tried)) if tried else None for tried, a in reached
        ],
        "acceptance_length": 1 + counters.num_accepted_tokens / steps if steps else None,
    }
