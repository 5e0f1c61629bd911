"""What doctor says: a finding a problem. The texts are data, in findings.toml."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_NUM_LISTED = 3


class Kind(BaseModel):
    """What the findings of one id have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    severity: Severity = "error"
    evidence: Literal["run", "read", "estimate"] = "read"
    why: str
    cure: str
    affects: str = ""  # of a known issue: the versions of vLLM, and whom it meets
    what: str = ""


KINDS = TypeAdapter(dict[str, Kind]).validate_python(
    tomllib.loads(files(__package__).joinpath("findings.toml").read_text(encoding="utf-8"))
)


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

    TEXTS: ClassVar = ("where", "found", "expected", "why", "cure")


def finding(
    id_: str,
    where: str,
    found: object,
    expected: object,
    severity: Severity | None = None,
    cure: str | None = None,
) -> Finding:
    """Return a finding with the texts of its kind, unless severity or cure are others."""
    kind = KINDS[id_]
    cure = cure or kind.cure
    return Finding(
        *(id_, severity or kind.severity, where, str(found), str(expected), kind.why, cure),
        evidence=kind.evidence,
        fixable=cure.startswith("--fix"),
    )


def findings(id_: str, wrong: Mapping[str, tuple[object, object]]) -> Iterable[Finding]:
    """Return one finding for all of `wrong`, name -> (found, expected); none without any."""
    if not wrong:
        return ()
    found, expected = next(iter(wrong.values()))
    return (finding(id_, listed(wrong), f"{found} ({len(wrong)} in all)", expected),)


def listed(names: Iterable[str]) -> str:
    """Return the first few names and how many there are, as in `a, b, c and 5 more`."""
    every = list(names)
    more = f" and {len(every) - _NUM_LISTED} more" if len(every) > _NUM_LISTED else ""
    return ", ".join(every[:_NUM_LISTED]) + more
