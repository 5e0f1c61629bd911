"""What results say of the drafts that a server made: k, acceptance by position, accepted length."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtp_graft.bench.intervals import bootstrap_pooled
from mtp_graft.dsv4.acceptance import wilson_interval
from mtp_graft.serving.metrics import SpecDecodeCounters, total

_KEYS = (
    *("k", "steps", "accepted_by_position", "acceptance_by_position"),
    *("acceptance_by_position_interval", "acceptance_length"),
)


def drafting_result(counters: SpecDecodeCounters | None) -> dict[str, Any]:
    """Return what a result says of its drafts; every key is null for a server that does not draft.

    Keys: `k`, `steps` (with drafts), `accepted_by_position` (the steps that accepted at least so
    many drafts), `acceptance_by_position` and `acceptance_length` (the properties of
    SpecDecodeCounters), and `acceptance_by_position_interval`: 95 %, Wilson's, which takes steps as
    independent.
    """
    if counters is None:
        return dict.fromkeys(_KEYS)
    intervals = [
        list(wilson_interval(accepted, tried)) if tried else None
        for tried, accepted in counters.reached
    ]
    values = (
        counters.k,
        counters.num_drafts,
        list(counters.accepted_per_position),
        counters.acceptance_by_position,
        intervals if counters.num_drafts else None,
        counters.acceptance_length,
    )
    return dict(zip(_KEYS, values, strict=True))


def pooled_drafting(rounds: Sequence[Sequence[SpecDecodeCounters]]) -> dict[str, Any]:
    """Return `drafting_result` of all rounds of the same prompts (none without drafts).

    The intervals, of `acceptance_length` too, resample prompts: rounds repeat a greedy text, so its
    steps are not independent of those of another round.
    """
    prompts = [total(of_prompt) for of_prompt in zip(*rounds, strict=True)]
    found = drafting_result(total(prompts) if prompts else None)
    if found["acceptance_length"] is None:
        return found | {"acceptance_length_interval": None}
    reached = np.array([[c.reached for c in prompts]], dtype=float)  # [1, P, k, 2]
    tried, accepted = reached[..., 0], reached[..., 1]
    low, high = bootstrap_pooled(accepted.sum(axis=2), tried[..., 0])
    return found | {
        "acceptance_by_position_interval": [
            None if rate is None else list(bootstrap_pooled(accepted[..., at], tried[..., at]))
            for at, rate in enumerate(found["acceptance_by_position"])
        ],
        "acceptance_length_interval": [1 + low, 1 + high],
    }
