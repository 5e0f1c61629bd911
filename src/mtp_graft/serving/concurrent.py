"""Several requests at a time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def concurrently(
    work: Callable[[Item], Result], items: Sequence[Item], concurrency: int
) -> Iterator[Result]:
    """Yield `work` of every item as they finish, `concurrency` at a time in threads.

    After a failure nothing new is begun, what was in work is still yielded, and then the first
    exception is raised.
    """
    stopped = Event()
    failures: list[Exception] = []

    def run(item: Item) -> list[Result]:
        if stopped.is_set():
            return []
        try:
            return [work(item)]
        except Exception as error:  # raised below, in the caller's thread
            failures.append(error)
            stopped.set()
            return []

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for future in as_completed([pool.submit(run, item) for item in items]):
                yield from future.result()
        finally:
            stopped.set()
    if failures:
        raise failures[0]
