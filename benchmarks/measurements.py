"""Result files that grow: every measurement is on the disk as soon as it is made.

A script that is stopped, or whose engine fails, leaves what it had; started again, it makes only
what is missing. Nothing new is begun after the deadline.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import EngineFailed, in_child
from record import device_name, write_result

Entry = dict[str, Any]


@dataclass(frozen=True)
class Deadline:
    """A moment after which nothing new is begun; it holds in every process of the host."""

    at: float  # seconds since the epoch

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        return cls(time.time() + seconds)

    def left(self) -> float:
        return self.at - time.time()

    def passed(self, needed_s: float = 0.0) -> bool:
        return self.left() < needed_s


@dataclass(frozen=True)
class Limits:
    """When no engine is started any more, and how long one may say nothing."""

    deadline: Deadline
    start_s: float
    stall_s: float

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--deadline-s", type=float, default=float("inf"))
        parser.add_argument("--start-s", type=float, default=60, help="no start with less left")
        parser.add_argument("--stall-s", type=float, default=540, help="silence that is a failure")

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Limits":
        return cls(Deadline.after(options.deadline_s), options.start_s, options.stall_s)


@dataclass
class Measurements:
    """One result file: `measurements` as they were made, `failures`, and `results` made of them."""

    path: Path
    benchmark: str
    summarize: Callable[[list[Entry]], Any]
    note: str
    entries: list[Entry] = field(default_factory=list)
    failures: list[Entry] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)  # of all runs that made the file

    def __post_init__(self) -> None:
        this = " ".join(["python", *sys.argv])
        if self.path.exists():
            before = json.loads(self.path.read_text())
            self.entries, self.failures = before["measurements"], before["failures"]
            self.commands = before.get("commands", [before["command"]])
            if before["device"] != device_name():
                raise SystemExit(f"{self.path}: is of {before['device']}; choose another --out")
        self.commands = list(dict.fromkeys([*self.commands, this]))

    def has(self, **key: Any) -> bool:
        return self.find(**key) is not None

    def find(self, **key: Any) -> Entry | None:
        """Return the measurement with these values, if it was made."""
        wanted = key.items()
        return next((e for e in self.entries if all(e.get(n) == v for n, v in wanted)), None)

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        shown = {name: value for name, value in entry.items() if not _is_long(value)}
        print(json.dumps(shown), flush=True)
        self.write()

    def run(self, job: str, limits: Limits, work: Callable[..., None], *args: Any) -> None:
        """Add what `work(send, *args)` sends from a process of its own, if there is time for it."""
        if limits.deadline.passed(limits.start_s):
            print(f"{limits.deadline.left():.0f} s left: {job} is not begun", flush=True)
            return
        print(job, flush=True)
        self.forget_failure(job)
        log = self.path.parent / "logs" / f"{self.path.stem}-{job}.log"
        try:
            for entry in in_child(work, *args, log=log, stall_s=limits.stall_s):
                self.add(entry)
        except EngineFailed as error:
            self.fail(job, str(error))

    def fail(self, job: str, reason: str) -> None:
        """Record that a job failed; a later run that does it drops this again."""
        self.forget_failure(job)
        self.failures.append({"job": job, "reason": reason})
        print(f"FAILED {job}: {reason[-1500:]}", flush=True)
        self.write()

    def forget_failure(self, job: str) -> None:
        self.failures = [f for f in self.failures if f["job"] != job]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        more = {"note": self.note, "commands": self.commands, "failures": self.failures}
        more["measurements"] = self.entries
        write_result(temporary, self.benchmark, self.summarize(self.entries), **more)
        temporary.replace(self.path)


def _is_long(value: Any) -> bool:
    return isinstance(value, list | dict) and len(json.dumps(value)) > 200
