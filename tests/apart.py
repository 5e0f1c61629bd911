"""Work that tests run in processes of their own; light, as each of them imports it."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from mtp_graft.errors import UsageError

Progress = Callable[[str, int, int], None]
#: What `fails` raises, by name.
FAILURES: dict[str, Exception] = {
    "usage": UsageError("--set: wrong"),
    "disk": OSError(28, "No space left on device", "/run/experts"),
    "bug": KeyError("c1a"),
}


def counts(path: Path, report: Progress) -> int:
    for done in range(3):
        report("counting", done, 3)
    path.write_text(str(os.getpid()))
    return 7


def fails(kind: str, report: Progress) -> None:
    if kind == "killed":
        os.kill(os.getpid(), 9)
    raise FAILURES[kind]


def hangs(path: Path, report: Progress) -> None:
    path.write_text(str(os.getpid()))
    report("working", 0, 0)
    time.sleep(600)


def takes_gpu_memory(gib: int, report: Progress) -> int:
    import torch

    return int(torch.ones(gib * 2**28, device="cuda").sum().item()) // 2**28
