"""What doctor says: one finding a problem, with the reason and the cure."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """A problem: where it is, what was found there, what was expected, why it matters, the cure."""

    id: str
    severity: Severity
    where: str
    found: str
    expected: str
    why: str  # what vLLM does with it
    cure: str
    fixable: bool = False  # by --fix: the cure is config or naming

    def as_json(self) -> dict[str, Any]:
        """Return the finding as JSON takes it."""
        return asdict(self)


def listed(names: Iterable[str]) -> str:
    """Return the first few names and how many there are, as in `a, b, c and 5 more`."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
