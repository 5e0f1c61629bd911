"""vLLM's speculative decoding counters, read from its Prometheus page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

_PREFIX = "vllm:spec_decode_num_"
_SAMPLE = re.compile(
    rf"^{_PREFIX}(?P<name>\w+?)_total(?:\{{(?P<labels>.*)\}})? (?P<value>\S+)", re.MULTILINE
)
_POSITION = re.compile(r'\bposition="(\d+)"')


@dataclass(frozen=True)
class SpecDecodeCounters:
    """Drafts and accepted tokens since the server started, or between two readings.

    `accepted_per_position[i]` counts the steps whose first i + 1 drafts were all accepted;
    `tried_per_position[i]` those whose first i were and that had one more. None: all that could.
    """

    num_drafts: int  # steps with drafts
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: tuple[int, ...]
    tried_per_position: tuple[int, ...] | None = None

    def __sub__(self, earlier: Self) -> "SpecDecodeCounters":
        positions = zip(self.accepted_per_position, earlier.accepted_per_position, strict=True)
        return SpecDecodeCounters(
            self.num_drafts - earlier.num_drafts,
            self.num_draft_tokens - earlier.num_draft_tokens,
            self.num_accepted_tokens - earlier.num_accepted_tokens,
            tuple(now - before for now, before in positions),
        )

    @property
    def acceptance(self) -> float | None:
        """Return accepted over drafted tokens (0..1), or None if nothing was drafted."""
        if self.num_draft_tokens == 0:
            return None
        return self.num_accepted_tokens / self.num_draft_tokens

    @property
    def k(self) -> int:
        """Return how many tokens a step drafts."""
        return len(self.accepted_per_position)

    @property
    def reached(self) -> list[tuple[int, int]]:
        """Return (tried, accepted) for each position: tried is where all before were accepted."""
        if self.tried_per_position is not None:
            return list(zip(self.tried_per_position, self.accepted_per_position, strict=True))
        return list(pairwise((self.num_drafts, *self.accepted_per_position)))

    @property
    def acceptance_by_position(self) -> list[float | None] | None:
        """Return for each draft position how often it is accepted, given that all before were.

        None for a position that no step reached, and in all if nothing was drafted. The product
        of the first i is the share of steps that accept at least i drafts.
        """
        if self.num_drafts == 0:
            return None
        return [accepted / tried if tried else None for tried, accepted in self.reached]

    @property
    def acceptance_length(self) -> float | None:
        """Return the tokens a step gives, its own one included; None if nothing was drafted."""
        if self.num_drafts == 0:
            return None
        return 1 + self.num_accepted_tokens / self.num_drafts


def total(counters: Sequence[SpecDecodeCounters]) -> SpecDecodeCounters:
    """Return the sum of one or more counters of the same k."""
    positions = zip(*(c.accepted_per_position for c in counters), strict=True)
    return SpecDecodeCounters(
        sum(c.num_drafts for c in counters),
        sum(c.num_draft_tokens for c in counters),
        sum(c.num_accepted_tokens for c in counters),
        tuple(map(sum, positions)),
    )


def parse_spec_decode(page: str) -> SpecDecodeCounters | None:
    """Sum the counters of all engines on a metrics page; None if the server does not draft."""
    totals: dict[str, float] = {}
    positions: dict[int, float] = {}
    for sample in _SAMPLE.finditer(page):
        name, value = sample["name"], float(sample["value"])
        if name == "accepted_tokens_per_pos":
            found = _POSITION.search(sample["labels"] or "")
            assert found is not None, sample[0]
            position = int(found[1])
            positions[position] = positions.get(position, 0.0) + value
        else:
            totals[name] = totals.get(name, 0.0) + value
    if "drafts" not in totals:
        return None
    return SpecDecodeCounters(
        int(totals["drafts"]),
        int(totals["draft_tokens"]),
        int(totals["accepted_tokens"]),
        tuple(int(positions[position]) for position in sorted(positions)),
    )
