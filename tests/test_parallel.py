"""Reading ahead, writing behind, and ranks: order, bounds, shares. The quantize stage's tests show
that errors of reading arrive, and that a computation that fails loses no write.
"""

import time

import pytest

from mtp_graft.stages.parallel import rank_device, read_ahead, share, write_behind


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


def test_every_unit_is_in_one_share_and_every_rank_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (share(range(3)), rank_device("cuda")) == ([0, 1, 2], "cuda")
    shares, devices = [], []
    for rank in range(3):
        for name, value in (("WORLD_SIZE", 3), ("RANK", rank), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))  # as torchrun does
        shares += share(range(11))
        devices.append(rank_device("cuda"))
    assert sorted(shares) == list(range(11))
    assert devices == ["cuda:0", "cuda:1", "cuda:2"] and rank_device("cpu") == "cpu"
