"""What every result file says beside its numbers; see "Measurements" in CONTRIBUTING.md.

    mtp-graft bench sweep ... --json sweep.json
    python benchmarks/record.py sweep.json benchmarks/results/sweep_h200.json "bench sweep ..."

keeps a command's result as a result file.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtp_graft.checkpoint.manifest import package_versions
from mtp_graft.stages.parallel import device_name

MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-dsv4"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a script's argument parser, with `--out` for its result file."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def write_result(path: Path, benchmark: str, results: Any, **more: Any) -> None:
    """Write one result file; `more` are further keys, such as a note, or replace ours."""
    report = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(),
        "commit": commit(),
        "versions": package_versions(),
        "command": " ".join(["python", *sys.argv]),
        "results": results,
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def measurements(path: Path) -> list[dict[str, Any]]:
    """Return what a result file has measured so far; nothing if there is no file."""
    return json.loads(path.read_text())["measurements"] if path.exists() else []


def add_measurements(
    path: Path,
    benchmark: str,
    new: list[dict[str, Any]],
    summarize: Callable[[list[dict[str, Any]]], dict[str, Any]],
    note: str,
) -> None:
    """Add to a file that several programs may write; `summarize` returns its other keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = [*measurements(path), *new]
        write_result(path, benchmark, note=note, measurements=found, **summarize(found))


def commit() -> str:
    """Return what GIT_COMMIT says, or the checkout's commit, `-dirty` with changes."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    folder = str(Path(__file__).parent)

    def git(*words: str) -> str:
        command = ["git", "-C", folder, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "HEAD") or "unknown") + ("-dirty" if git("status", "--short") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="what --json wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("command", help="the command that made it")
    options = parser.parse_args()
    results = json.loads(options.result.read_text())
    name = options.out.stem.rpartition("_")[0] or options.out.stem
    write_result(options.out, name, results, command=options.command)


if __name__ == "__main__":
    main()
