"""Reading ahead and writing behind: order and bounds. The quantize stage's tests show
that errors of reading arrive, and that a computation that fails loses no write.
"""

import time

import pytest

from mtp_graft.stages.parallel import read_ahead, write_behind


def test_results_come_in_order_and_no_more_is_read_than_asked_for() -> None:
    seen: list[int] = []

    def read(item: int) -> int:
        seen.append(item)
        time.sleep(0.02 * (item % 3 == 0))
        return item * item

    with read_ahead(read, range(100), 4) as results:
        assert [next(results) for _ in range(12)] == [i * i for i in range(12)]
    assert len(seen) <= 12 + 4


def test_an_error_of_writing_is_not_lost() -> None:
    with pytest.raises(ZeroDivisionError), write_behind() as write:
        write(lambda: 1 // 0)
