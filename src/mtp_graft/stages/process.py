"""Work in a process of its own: the GPU memory that it takes is free again when it has ended."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from mtp_graft.errors import GraftError
from mtp_graft.stages.inputs import Progress

Result = TypeVar("Result")


def run_in_process(work: Callable[..., Result], *arguments: Any, report: Progress) -> Result:
    """Return `work(*arguments, report)`, called in a new process that is gone afterwards.

    The process ends with ours, by whatever ours ends (Ctrl-C, SIGKILL). A GraftError or OSError of
    `work` is raised here; another exception is printed by the process. Raises GraftError if the
    process ended without a result. To be called in the main thread.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sending, work, arguments))
    # Ctrl-C is ours to handle, and to end the process, which inherits that it ignores it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
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
        process.join(10.0)
        how = f"ended with status {process.exitcode}; what it printed says why"
        if process.exitcode == -signal.SIGKILL:
            how = "was killed; out of memory? Run again to go on"
        raise GraftError(f"{work.__name__}: its process {how}") from None
    finally:
        process.kill()
        process.join()
        receiving.close()


def _child(sending: Connection, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = work(*arguments, lambda *step: sending.send(("progress", step)))
        sending.send(("done", result))
    except (GraftError, OSError) as error:
        sending.send(("failed", error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
