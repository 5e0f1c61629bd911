"""Several requests at a time."""

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def concurrently(
    work: Callable[[Item], Result], items: Sequence[Item], concurrency: int
) -> Iterator[Result]:
    """Yield `work` of every item as they finish, `concurrency` at a time in threads.

    After a failure nothing new is begun, what was in work is still yielded, and then the first
    exception is raised. A caller that leaves, by Ctrl-C for one, does not wait for what is in
    work: the threads are daemons, so that the program can end before an answer comes.
    """
    pending, lock, stopped = list(reversed(items)), Lock(), Event()
    finished: SimpleQueue[tuple[Result] | Exception | None] = SimpleQueue()

    def run() -> None:
        while not stopped.is_set():
            with lock:
                if not pending:
                    break
                item = pending.pop()
            try:
                finished.put((work(item),))
            except Exception as error:  # raised below, in the caller's thread
                stopped.set()
                finished.put(error)
        finished.put(None)

    running = min(concurrency, len(items))
    for _ in range(running):
        Thread(target=run, daemon=True).start()
    failures: list[Exception] = []
    try:
        while running:
            match finished.get():
                case None:
                    running -= 1
                case Exception() as error:
                    failures.append(error)
                case (result,):
                    yield result
    finally:
        stopped.set()
    if failures:
        raise failures[0]
