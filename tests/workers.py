"""Cores of its own for each of pytest's workers, so that two engines do not share them."""

import os

CORES = sorted(os.sched_getaffinity(0))  # all that the test run may use


def keep_to_own_cores() -> None:
    """Bind a worker of pytest-xdist, and what it starts, to its share of the cores."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        index, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.sched_setaffinity(0, CORES[index % len(CORES) :: count])
