"""vLLM's speculative decoding counters, read from its Prometheus page."""

import re
from dataclasses import dataclass
from typing import Self

_PREFIX = "vllm:spec_decode_num_"
_SAMPLE = re.compile(
    rf"^{_PREFIX}(?P<name>\w+?)_total(?:\{{(?P<labels>.*)\}})? (?P<value>\S+)", re.MULTILINE
)
_POSITION = re.compile(r'\bposition="(\d+)"')


@dataclass(frozen=True)
class SpecDecodeCounters:
    """Drafts and accepted tokens since the server started, or between two readings."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: tuple[int, ...]

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
