"""Work beside the main thread and in processes of its own, and the device that it is done on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import apart
from mtp_graft.errors import GraftError, UsageError
from mtp_graft.stages import parallel
from mtp_graft.stages.parallel import device_name, find_device, gpus, run_in_process
from serving.bench_server import quiet
from serving.conftest import NoDriver, install_gpus, is_running, wait_gone

pytestmark = pytest.mark.usefixtures("cuda_build")


def test_results_come_in_order_no_more_is_read_than_asked_for_and_no_error_is_lost() -> None:
    seen: list[int] = []

    def read(item: int) -> int:
        seen.append(item)
        time.sleep(0.02 * (item % 3 == 0))
        return item * item

    with parallel.read_ahead(read, range(100), 4) as results:
        assert [next(results) for _ in range(12)] == [i * i for i in range(12)]
    assert len(seen) <= 12 + 4
    with pytest.raises(ZeroDivisionError), parallel.write_behind() as write:
        write(lambda: 1 // 0)


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
        ("usage", UsageError, r"^--set: wrong$", ""),
        ("disk", OSError, "No space left on device: '/run/experts'", ""),
        ("killed", GraftError, "^fails: its process was killed; out of memory", ""),
        ("bug", GraftError, "^fails: its process ended with status 1; what it pr", "KeyError: 'c1"),
    ],
)
def test_errors_reach_caller(kind: str, error: Any, message: str, printed: str, capfd: Any) -> None:
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
def test_child_ends_with_parent(signum: signal.Signals, tmp_path: Path, repo_root: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    command, pid = [sys.executable, tmp_path / "parent.py", tmp_path / "pid"], tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": f"{repo_root}/src:{repo_root}/tests"}
    how: Any = {"start_new_session": True, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **how) as parent:
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


def test_the_driver_names_the_gpus_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, "NVIDIA H200", "NVIDIA H200", memory_mib=143771)
    assert device_name() == "2x NVIDIA H200"
    assert find_device("auto") == "cuda" and find_device("cpu") == "cpu"
    gpus.cache_clear()
    install_gpus(monkeypatch, error="Driver/library version mismatch")
    with pytest.raises(GraftError, match="driver says Driver/library version mismatch"):
        device_name()


@pytest.mark.parametrize("why", ["CPU build", "no driver", "hidden"])
def test_without_gpus_the_processor_is_named(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = NoDriver("Driver Not Loaded") if why == "no driver" else None
    install_gpus(monkeypatch, "NVIDIA H200", memory_mib=143771, error=error)
    if why == "CPU build":
        monkeypatch.setattr(torch.version, "cuda", None)
    if why == "hidden":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_name().endswith(" cores")
    assert find_device("auto") == "cpu"


@pytest.mark.gpu
def test_the_name_is_torchs_own_and_cuda_stays_unused() -> None:
    script = (
        "import torch; from mtp_graft.stages.parallel import device_name; print(device_name());"
        "assert not torch.cuda.is_initialized();"
        "print(f'{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}')"
    )
    ours, torchs = subprocess.check_output([sys.executable, "-c", script], text=True).splitlines()
    assert ours == torchs
