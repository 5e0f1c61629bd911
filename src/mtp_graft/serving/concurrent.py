"""Several requests at a time."""

from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from threading import Event
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
    stopped = Event()
    failures: list[Exception] = []

    def attempt(item: Item) -> tuple[Result] | None:
        if stopped.is_set():
            return None
        try:
            return (work(item),)
        except Exception as error:  # raised below, in the caller's thread
            failures.append(error)
            stopped.set()
            return None

    pool = ThreadPool(concurrency)
    try:
        for found in pool.imap_unordered(attempt, items):
            if found is not None:
                yield found[0]
    finally:
        stopped.set()
        pool.terminate()
    if failures:
        raise failures[0]
