"""Files read ahead of a computation, and written behind it, in threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], readers: int
) -> Iterator[Iterator[Result]]:
    """Yield the results of `read` in the items' order; up to `readers` of them are in work.

    An error of `read` is raised where its result would have been.
    """
    with ThreadPoolExecutor(readers) as pool:
        left = iter(items)
        pending = deque(pool.submit(read, item) for item in islice(left, readers))

        def results() -> Iterator[Result]:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(read, item) for item in islice(left, 1))
                yield result

        try:
            yield results()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def write_behind(writers: int = 1) -> Iterator[Callable[..., None]]:
    """Yield a function that calls another one in a thread, up to `writers` calls at once.

    It waits while as many calls are in work and another is waiting. All are done at the end, also
    when it is reached by an error; a call's own error is raised by a later call or at the end.
    """
    with ThreadPoolExecutor(writers) as pool:
        pending: deque[Future[Any]] = deque()

        def write(call: Callable[..., Any], *arguments: Any) -> None:
            while len(pending) > writers:
                pending.popleft().result()
            pending.append(pool.submit(call, *arguments))

        yield write
        for future in pending:
            future.result()
