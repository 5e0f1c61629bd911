"""What doctor says: a finding a problem. The texts are data, in findings.toml."""

import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
#: What is wrong with one tensor or module: id of the finding, name, what was found and expected.
Defect = tuple[str, str, object, object]


class Kind(BaseModel):
    """What the findings of one id have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    severity: Severity = "error"
    evidence: Literal["run", "read", "estimate"] = "read"
    why: str
    cure: str
    affects: str = ""  # of a known issue: the versions of vLLM, and whom it meets
    what: str = ""


_TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
KINDS = TypeAdapter(dict[str, Kind]).validate_python(_TEXTS)


@dataclass(frozen=True)
class Finding:
    """A problem: where it is, what was found there, what was expected, why it matters, the cure."""

    id: str
    severity: Severity
    where: str
    found: str
    expected: str
    why: str
    cure: str
    evidence: str
    fixable: bool  # by --fix


def finding(
    id_: str, where: str, found: Any, expected: Any, level: Severity | None = None, cure: str = ""
) -> Finding:
    """Return a finding with the texts of its kind, unless severity or cure are others."""
    kind = KINDS[id_]
    level, cure = level or kind.severity, cure or kind.cure
    texts = (where, str(found), str(expected), kind.why, cure)
    return Finding(id_, level, *texts, kind.evidence, fixable=cure.startswith("--fix"))


def merged(check: Callable[..., Iterable[Defect]]) -> Callable[..., Iterator[Finding]]:
    """Let a check yield defects; those of one id become one finding, as the first one says."""

    @wraps(check)
    def findings(*given: Any) -> Iterator[Finding]:
        defects: dict[str, list[Defect]] = {}
        for defect in check(*given):
            defects.setdefault(defect[0], []).append(defect)
        for id_, same in defects.items():
            _, _, found, expected = same[0]
            where = listed([name for _, name, _, _ in same])
            yield finding(id_, where, f"{found} ({len(same)} in all)", expected)

    return findings


def listed(names: Sequence[str]) -> str:
    """Return the first names and how many more there are, as in `a, b, c and 5 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
