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
from mtp_graft.stages.process import run_in_process


def quiet(_label: str, _done: int, _total: int) -> None: ...


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(path: Path) -> int:
    """Return the process that writes its number to `path`, once it has."""
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


def test_result_and_progress_come_from_a_process_that_is_gone(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    result = run_in_process(apart.counts, tmp_path / "pid", report=lambda *s: steps.append(s))
    assert result == 7
    assert steps == [("counting", done, 3) for done in range(3)]
    pid = int((tmp_path / "pid").read_text())
    assert pid != os.getpid() and not is_there(pid)


def test_what_went_wrong_there_is_raised_here(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GraftError, match=r"^capture: not finished$"):
        run_in_process(apart.fails, "user", report=quiet)
    with pytest.raises(UsageError):
        run_in_process(apart.fails, "usage", report=quiet)
    with pytest.raises(OSError, match="No space left") as full:
        run_in_process(apart.fails, "disk", report=quiet)
    assert full.value.filename == "/run/experts"
    assert capfd.readouterr().err == "", "one message, and it is the caller's to print"
    with pytest.raises(GraftError, match=r"^fails: its process was killed; out of memory"):
        run_in_process(apart.fails, "killed", report=quiet)
    with pytest.raises(
        GraftError, match=r"^fails: its process ended with status 1; what it printed"
    ):
        run_in_process(apart.fails, "bug", report=quiet)
    assert "KeyError: 'c1a'" in capfd.readouterr().err


def test_an_exception_here_ends_the_process(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_process(apart.hangs, tmp_path / "pid", report=interrupt)
    assert not is_there(int((tmp_path / "pid").read_text()))


PARENT = """
import sys
from pathlib import Path
import apart
from mtp_graft.stages.process import run_in_process
if __name__ == "__main__":
    run_in_process(apart.hangs, Path(sys.argv[1]), report=lambda *_: None)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_with_the_one_that_started_it(
    signum: signal.Signals, tmp_path: Path, repo_root: Path
) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "pid")]
    environment = {**os.environ, "PYTHONPATH": f"{repo_root}/src:{repo_root}/tests"}
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as parent:
        pid = wait_for(tmp_path / "pid")
        if signum == signal.SIGINT:
            os.killpg(parent.pid, signum)  # as a terminal does
        else:
            parent.send_signal(signum)
        _, errors = parent.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while is_there(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert errors.count("Traceback") == (signum == signal.SIGINT), "the parent's own, if any"


@pytest.mark.gpu
def test_gpu_memory_that_was_taken_is_free_again() -> None:
    import pynvml
    import torch

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = pynvml.nvmlDeviceGetMemoryInfo(gpu).free
    assert run_in_process(apart.takes_gpu_memory, 8, report=quiet) == 8
    assert before - pynvml.nvmlDeviceGetMemoryInfo(gpu).free < 2**30
    assert not torch.cuda.is_initialized()
