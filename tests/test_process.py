"""Work in a process of its own: what comes back, and that nothing of it stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import apart
from mtp_graft.errors import GraftError, UsageError
from mtp_graft.stages.parallel import run_in_process
from serving.bench_server import quiet
from serving.conftest import is_running, wait_gone


def test_result_and_progress_come_from_a_process_that_is_gone(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    result = run_in_process(apart.counts, tmp_path / "pid", report=lambda *s: steps.append(s))
    assert result == 7
    assert steps == [("counting", done, 3) for done in range(3)]
    pid = int((tmp_path / "pid").read_text())
    assert pid != os.getpid() and not is_running(pid)


@pytest.mark.parametrize(
    ("kind", "error", "message", "printed"),
    [
        ("user", GraftError, r"^capture: not finished$", ""),
        ("usage", UsageError, r"^--set: wrong$", ""),
        ("disk", OSError, "No space left on device: '/run/experts'", ""),
        ("killed", GraftError, "^fails: its process was killed; out of memory", ""),
        ("bug", GraftError, "^fails: its process ended with status 1; what it pr", "KeyError: 'c1"),
    ],
)
def test_what_went_wrong_there_is_raised_here(
    kind: str, error: type[Exception], message: str, printed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error, match=message):
        run_in_process(apart.fails, kind, report=quiet)
    errors = capfd.readouterr().err
    assert printed in errors and bool(printed) == bool(errors), "the caller prints the message"


def test_an_exception_here_ends_the_process(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_process(apart.hangs, tmp_path / "pid", report=interrupt)
    assert not is_running(int((tmp_path / "pid").read_text()))


PARENT = """
import sys
from pathlib import Path
import apart
from mtp_graft.stages.parallel import run_in_process
if __name__ == "__main__":
    run_in_process(apart.hangs, Path(sys.argv[1]), report=lambda *_: None)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_the_process_ends_with_the_one_that_started_it(
    signum: signal.Signals, tmp_path: Path, repo_root: Path
) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    command, pid = [sys.executable, tmp_path / "parent.py", tmp_path / "pid"], tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": f"{repo_root}/src:{repo_root}/tests"}
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as parent:
        while not (pid.exists() and pid.read_text()):
            assert parent.poll() is None
            time.sleep(0.05)
        kill = os.killpg if signum == signal.SIGINT else os.kill  # a terminal interrupts all
        kill(parent.pid, signum)
        _, errors = parent.communicate(timeout=60)
    assert wait_gone([int(pid.read_text())], timeout_s=30) == []
    assert errors.count("Traceback") == (signum == signal.SIGINT), "the parent's own, if any"


@pytest.mark.gpu
def test_gpu_memory_that_was_taken_is_free_again() -> None:
    import pynvml

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = pynvml.nvmlDeviceGetMemoryInfo(gpu).free
    assert run_in_process(apart.takes_gpu_memory, 8, report=quiet) == 8
    assert before - pynvml.nvmlDeviceGetMemoryInfo(gpu).free < 2**30
