"""Find the lines of a vLLM log that say why it stopped."""

import re
from pathlib import Path

_TAIL_BYTES = 256 * 1024
_MAX_LINE = 300
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
#: `(EngineCore pid=7) ERROR 11-23 21:00:00 [core.py:100] `, in whole or in part.
_PREFIX = re.compile(
    r"^(\([\w ]+ pid=\d+\) ?)*((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]+\] ?)?"
)
_EXCEPTION = re.compile(r"^([\w.]*(Error|Exception)\b|[\w .:-]*\berror): ?\S", re.IGNORECASE)
#: The processes above the failing one only report that it failed.
_SECOND_HAND = re.compile(r"root cause|Engine core initialization failed", re.IGNORECASE)


def explain(log: Path, max_lines: int = 3) -> str:
    """Return why the process that wrote `log` stopped, on one line.

    These are the first exceptions of the last 256 KiB that are not second-hand, each one once;
    without any, the last lines that are not blank.
    """
    text = _ANSI.sub("", _read_tail(log))
    lines = [_PREFIX.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if _EXCEPTION.match(line) and not _SECOND_HAND.search(line)]
    chosen = list(dict.fromkeys(errors))[:max_lines] or lines[-max_lines:]
    return " | ".join(line[:_MAX_LINE] for line in chosen) or "it wrote nothing"


def last_line(log: Path) -> str:
    """Return the last line of `log` that is not blank, without vLLM's prefix."""
    lines = [line for line in _ANSI.sub("", _read_tail(log, 4096)).splitlines() if line.strip()]
    return _PREFIX.sub("", lines[-1]).strip()[:_MAX_LINE] if lines else ""


def _read_tail(log: Path, num_bytes: int = _TAIL_BYTES) -> str:
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - num_bytes))
        return file.read().decode(errors="replace")
