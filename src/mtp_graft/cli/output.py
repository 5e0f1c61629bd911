"""What commands print: results to standard output, progress and notes to standard error."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

Report = Callable[[str, int, int], None]


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Show on standard error what is going on: a bar on a terminal, else a line per step."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        last = ""

        def log(label: str, _done: int, _total: int) -> None:
            nonlocal last
            step = label.partition(",")[0]  # without a count of seconds
            if step != last:
                note(step)
            last = step

        yield log
        return
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)

        def report(label: str, done: int, total: int) -> None:
            progress.update(task, description=label, completed=done, total=total or None)

        yield report


def show(result: dict[str, Any], json_file: Path | None, *parts: str | Table) -> None:
    """Write a command's result to `json_file`, `-` being standard output; print parts for people.

    Where JSON has standard output for itself, they go to standard error.
    """
    in_place = str(json_file) == "-"
    if json_file is not None:
        text = json.dumps(result, indent=2, ensure_ascii=False)
        print(text) if in_place else json_file.write_text(text + "\n")
    console = Console(stderr=in_place)
    for part in parts:
        console.print(part, soft_wrap=True, markup=False, highlight=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table for `show`."""
    made = Table(*columns)
    for row in rows:
        made.add_row(*map(str, row))
    return made


def check_writable(target: Path | None) -> Path | None:
    """Return an option's file if it can be written: OSError now, not after hours of work.

    Nothing is left behind, and what is there stays.
    """
    if target is not None and str(target) != "-":
        existed = target.exists()
        target.open("a").close()
        if not existed:
            target.unlink(missing_ok=True)  # under torchrun every rank looks
    return target


def note(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)
