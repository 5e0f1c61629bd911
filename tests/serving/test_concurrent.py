"""Several requests at a time: how many, what a failure leaves, and Ctrl-C."""

import signal
import subprocess
import sys
import time

import pytest

from mtp_graft.errors import GraftError
from mtp_graft.serving.concurrent import concurrently


def test_no_more_are_in_work_than_asked() -> None:
    in_work: list[int] = []
    most: list[int] = []

    def work(item: int) -> int:
        in_work.append(item)
        most.append(len(in_work))
        time.sleep(0.01)
        in_work.remove(item)
        return item

    assert sorted(concurrently(work, range(20), 3)) == list(range(20))
    assert max(most) == 3


def test_after_a_failure_what_was_in_work_is_yielded_and_nothing_new_begun() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.05 * (item != 0))
        if item == 0:
            raise GraftError("the first one")
        return item

    finished: list[int] = []
    with pytest.raises(GraftError, match="the first one"):
        finished.extend(concurrently(work, range(100), 4))
    assert sorted(begun) == [0, *sorted(finished)]
    assert len(begun) <= 4


INTERRUPTED = """
import signal, time
from mtp_graft.serving.concurrent import concurrently

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it

def work(item):
    if item == 3:
        print("in work", flush=True)
    time.sleep(60)

for _ in concurrently(work, range(100), 4):
    pass
"""


def test_ctrl_c_does_not_wait_for_what_is_in_work() -> None:
    command = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as client:
        assert client.stdout is not None and client.stdout.readline() == "in work\n"
        client.send_signal(signal.SIGINT)
        assert client.wait(timeout=5) == -signal.SIGINT
