"""What commands print: results to standard output, progress and notes to standard error."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

Report = Callable[[str, int, int], None]


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Show on standard error what is going on: a bar on a terminal, else a line per step."""
    console = Console(stderr=True)
    if not console.is_terminal:
        note_new = lru_cache(maxsize=1)(note)  # not again what was told last
        yield lambda label, _done, _total: note_new(label.partition(",")[0])  # without the seconds
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)
        yield lambda label, done, total: progress.update(
            task, description=label, completed=done, total=total or None
        )


def show(result: dict[str, Any], json_file: Path | None, *parts: str | Table) -> None:
    """Write a command's result to `json_file`; print parts for people, beside `-` to stderr."""
    in_place = str(json_file) == "-"
    if json_file is not None:
        text = _printable(json.dumps(result, indent=2, ensure_ascii=False))
        print(text) if in_place else json_file.write_text(text + "\n", "utf-8")
    console = Console(stderr=in_place)
    for part in parts:
        said = _printable(part) if isinstance(part, str) else part
        console.print(said, soft_wrap=True, markup=False, highlight=False)


def _printable(text: str) -> str:
    """Escape what is no text, such as a byte of a file's name, as JSON does."""
    return text.encode(errors="backslashreplace").decode()


def table(records: Iterable[Mapping[str, Any]], *keys: str) -> Table:
    """Return a table for `show`: a row a record, the columns by their names in the JSON."""
    made = Table(*keys)
    for record in records:
        made.add_row(*(_cell(record[key]) for key in keys))
    return made


def _cell(value: Any) -> str:
    match value:
        case None:
            return "–"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.1f}" if abs(value) >= 1 else f"{value:.3f}"
        case {"median": middle, "min": low, "max": high}:
            return f"{_cell(middle)} ({_cell(low)} to {_cell(high)})"
        case {"estimate": middle, "interval": [low, high]}:
            return f"{middle:.2f} ({low:.2f} to {high:.2f})"
        case dict():
            return ", ".join(f"{_cell(count)} {name}" for name, count in value.items()) or "–"
        case list():
            return ", ".join(map(_cell, value))
    return str(value)


def check_writable(target: Path | None) -> Path | None:
    """Return an option's file if it can be written: OSError now, not after hours of work."""
    if target is not None and str(target) != "-":
        existed = target.exists()
        target.open("a").close()
        if not existed:
            target.unlink()
    return target


def note(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)
