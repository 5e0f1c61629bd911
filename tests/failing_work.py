"""What the children of `benchmarks/engines.py` do in a test; light, as each of them imports it."""

import os
import time
from collections.abc import Callable

Send = Callable[[object], None]


def raises(send: Send) -> None:
    send("first")
    raise OSError("no such GPU")


def dies(_send: Send) -> None:
    os._exit(3)


def hangs(_send: Send) -> None:
    time.sleep(600)


def goes_on(send: Send) -> None:
    send(os.getpid())
    time.sleep(600)


def sends_and_hangs(send: Send) -> None:
    send("first")
    time.sleep(600)
