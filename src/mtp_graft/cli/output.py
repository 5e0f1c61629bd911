"""What commands print: results to standard output, progress and notes to standard error."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mtp_graft.errors import GraftError

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


def write_json(result: dict[str, Any], target: Path | None) -> None:
    """Write a command's result to `target`, `-` being standard output; None writes nothing.

    Raises GraftError for a file that cannot be written.
    """
    if target is None:
        return
    text = json.dumps(result, indent=2, ensure_ascii=False)
    if is_stdout(target):
        print(text)
        return
    try:
        target.write_text(text + "\n")
    except OSError as error:
        raise GraftError(f"{target}: cannot be written ({error.strerror})") from error


def check_writable(target: Path | None) -> Path | None:
    """Return `target`, an option's file, if it can be written: said now, not after hours of work.

    Raises GraftError if not. Nothing is left behind, and what is there stays.
    """
    if target is None or is_stdout(target):
        return target
    existed = target.exists()
    try:
        target.open("a").close()
    except OSError as error:
        raise GraftError(f"{target}: cannot be written ({error.strerror})") from error
    if not existed:
        target.unlink(missing_ok=True)  # under torchrun every rank looks
    return target


def is_stdout(target: Path | None) -> bool:
    """Say whether JSON goes to standard output, which then has nothing else."""
    return target is not None and str(target) == "-"


def result_console(json_target: Path | None) -> Console:
    """Return standard output, or standard error where JSON has standard output for itself."""
    return Console(stderr=is_stdout(json_target))


def note(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)
