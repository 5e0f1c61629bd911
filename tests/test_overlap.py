"""Reading ahead and writing behind: order, bounds, errors."""

import threading
import time

import pytest

from mtp_graft.stages.overlap import read_ahead, write_behind


class Broken(Exception):
    pass


def test_results_come_in_order_though_reading_takes_different_times() -> None:
    def read(item: int) -> int:
        time.sleep(0.02 * (item % 3 == 0))
        return item * item

    with read_ahead(read, range(12), 4) as results:
        assert list(results) == [i * i for i in range(12)]


def test_no_more_is_read_than_asked_for() -> None:
    read: list[int] = []
    with read_ahead(read.append, range(100), 3) as results:
        for _ in range(5):
            next(results)
    assert len(read) <= 5 + 3


def test_an_error_of_reading_comes_at_its_place() -> None:
    def read(item: int) -> int:
        if item == 2:
            raise Broken
        return item

    with read_ahead(read, range(5), 2) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(Broken):
            next(results)


def test_writes_are_in_order_one_at_a_time_and_done_at_the_end() -> None:
    written: list[int] = []
    busy = threading.Lock()

    def slow(item: int) -> None:
        assert busy.acquire(blocking=False), "two writes at once"
        time.sleep(0.01)
        written.append(item)
        busy.release()

    with write_behind() as write:
        for item in range(6):
            write(slow, item)
    assert written == list(range(6))


def test_as_many_writes_as_asked_for_are_in_work_and_one_more_waits() -> None:
    started: list[int] = []
    together = threading.Barrier(2, timeout=10)  # passed only by two writes at once
    go_on = threading.Event()

    def wait(item: int) -> None:
        together.wait()
        started.append(item)
        go_on.wait(10)

    with write_behind(2) as write:
        for item in range(3):
            write(wait, item)
        fourth = threading.Thread(target=write, args=(wait, 3))
        fourth.start()
        fourth.join(0.1)
        assert fourth.is_alive(), "a fourth write was taken"
        assert sorted(started) == [0, 1]
        go_on.set()
        fourth.join()
    assert sorted(started) == [0, 1, 2, 3]


def test_writes_are_done_even_if_the_computation_fails() -> None:
    written: list[int] = []

    def slow(item: int) -> None:
        time.sleep(0.05)
        written.append(item)

    with pytest.raises(Broken), write_behind() as write:
        write(slow, 1)
        write(slow, 2)
        raise Broken
    assert written == [1, 2]


def test_an_error_of_writing_is_not_lost() -> None:
    def fail() -> None:
        raise Broken

    with pytest.raises(Broken), write_behind() as write:
        write(fail)
