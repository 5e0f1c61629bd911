"""Work in a process of its own: the GPU memory that it takes is free again when it has ended."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from mtp_graft.errors import GraftError

# The process imports this module, so it imports little.
Result = TypeVar("Result")
Report = Callable[[str, int, int], None]  # label, units done, units in all
_EXIT_S = 10.0


def run_in_process(work: Callable[..., Result], *arguments: Any, report: Report) -> Result:
    """Return `work(*arguments, report)`, called in a new process that is gone afterwards.

    The process ends with ours, by whatever ours ends (Ctrl-C, SIGKILL). A GraftError or OSError of
    `work` is raised here; another exception is printed by the process. Raises GraftError if the
    process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sending, work, arguments))
    _start_without_sigint(process)
    sending.close()
    try:
        while True:
            kind, value = receiving.recv()
            if kind == "done":
                return value
            if kind == "failed":
                raise value
            report(*value)
    except EOFError:
        process.join(_EXIT_S)
        raise GraftError(_how_it_ended(work.__name__, process.exitcode)) from None
    finally:
        process.kill()
        process.join()
        receiving.close()


def _start_without_sigint(process: multiprocessing.process.BaseProcess) -> None:
    """Start a process that Ctrl-C does not reach: it is ours to handle, and to end the process."""
    resource_tracker.ensure_running()  # starting it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(sending: Connection, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(label: str, done: int, total: int) -> None:
        sending.send(("progress", (label, done, total)))

    try:
        sending.send(("done", work(*arguments, report)))
    except (GraftError, OSError) as error:
        sending.send(("failed", error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _how_it_ended(name: str, status: int | None) -> str:
    if status == -signal.SIGKILL:
        return f"{name}: its process was killed; out of memory? Run again to go on"
    return f"{name}: its process ended with status {status}; what it printed says why"
