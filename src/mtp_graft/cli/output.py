"""What commands print: results to standard output, progress and notes to standard error."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mtp_graft.bench.page import number

Report = Callable[[str, int, int], None]


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Show on standard error what is going on: a bar on a terminal, else a line per step."""
    console = Console(stderr=True)
    if not console.is_terminal:
        told = ""

        def log(label: str, _done: int, _total: int) -> None:
            nonlocal told
            step = label.partition(",")[0]  # without a count of seconds
            if step != told:
                note(step)
            told = step

        yield log
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)
        yield lambda label, done, total: progress.update(
            task, description=label, completed=done, total=total or None
        )


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


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """Return a table for `show`; numbers have one decimal, None is a dash."""
    made = Table(*columns)
    for row in rows:
        made.add_row(*(number(v) if v is None or isinstance(v, float) else str(v) for v in row))
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
