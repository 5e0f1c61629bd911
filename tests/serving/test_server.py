import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mtp_graft.errors import GraftError
from mtp_graft.serving import server
from mtp_graft.serving.command import START_LIMIT, ServeOptions, build_command
from mtp_graft.serving.server import ServerProcess, explain, managed_server

from .conftest import command_environment, is_running, read_record, wait_gone

Configure = Callable[..., None]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL_S", 0.05)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "record.json"


def test_a_managed_server_answers_inside_its_block_and_is_gone_after(
    fake: Configure, grafted: Path, tmp_path: Path, record: Path
) -> None:
    fake(record=str(record))
    seen: list[float] = []
    options = ServeOptions(grafted, port=0)
    log = tmp_path / "log" / "vllm.log"
    with managed_server(options, log, on_start=lambda s, _line: seen.append(s)) as client:
        assert client.complete([5, 6], 3) == (11, 18, 25)
        started = read_record(record)
        assert all(is_running(pid) for pid in started["pids"])
    assert wait_gone(started["pids"]) == []
    assert started["env"]["VLLM_PLUGINS"] == "mtp_graft"
    assert seen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "dies"}, r"base: vLLM ended with status 3 .*vllm\.log: KeyError: 'c1a'$"),
        ({"mode": "dies_on_completion"}, "status 7 .*RuntimeError: died in the first step"),
        ({"mode": "refuses"}, "status 500.*no such kernel"),  # healthy is not ready
        ({"mode": "never_healthy"}, "is not ready after 2 s"),
    ],
)
def test_a_server_that_does_not_get_ready_is_explained_and_leaves_nothing(
    fake: Configure,
    base: Path,
    tmp_path: Path,
    record: Path,
    settings: dict[str, str],
    message: str,
) -> None:
    fake(record=str(record), **settings)
    timeout_s = 2.0 if settings["mode"] == "never_healthy" else None
    with (
        pytest.raises(GraftError, match=message),
        managed_server(ServeOptions(base, port=0), tmp_path / "vllm.log", timeout_s=timeout_s),
    ):
        pytest.fail("the block was entered")
    assert wait_gone(read_record(record)["pids"]) == []


def test_a_server_may_take_the_time_that_its_weights_take_to_read(
    vllm: object, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 150 * 10**9
    os.truncate(base / "model-1.safetensors", size)  # sparse
    options = ServeOptions(base, port=0)
    limits_s: list[float] = []

    def ready(_self: ServerProcess, limit_s: float, _on_poll: object) -> bool:
        limits_s.append(limit_s)
        return True

    monkeypatch.setattr(ServerProcess, "wait_ready", ready)
    with managed_server(options, tmp_path / "vllm.log"):
        assert limits_s[0] > size / 100e6
        assert build_command(options).env[START_LIMIT] == str(limits_s[0]), "vLLM's own limit"
    monkeypatch.setenv(START_LIMIT, "7")
    assert build_command(options).env[START_LIMIT] == "7"
    monkeypatch.setenv(START_LIMIT, "soon")
    with pytest.raises(GraftError, match="'soon', expected whole seconds"):
        build_command(options)


@pytest.fixture
def hangup_ends() -> Iterator[None]:
    """SIGHUP as in a terminal, also where the tests run under `nohup`; processes inherit it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup_ends")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, None])
def test_a_signal_or_an_exception_ends_the_server_too_also_one_that_ignores_sigterm(
    fake: Configure,
    base: Path,
    tmp_path: Path,
    record: Path,
    signum: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "GRACE_S", 0.3)
    before = signal.getsignal(signal.SIGTERM)
    fake(record=str(record), mode="ignores_sigterm")
    with (
        pytest.raises(SystemExit if signum else KeyboardInterrupt) as ended,
        managed_server(ServeOptions(base, port=0), tmp_path / "vllm.log"),
    ):
        if signum is None:
            raise KeyboardInterrupt
        signal.raise_signal(signum)
        pytest.fail("the block went on")
    if isinstance(ended.value, SystemExit):
        assert signum is not None and ended.value.code == 128 + signum
    assert wait_gone(read_record(record)["pids"]) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_taken_port_is_an_error_before_anything_starts(
    fake: Configure, base: Path, tmp_path: Path, record: Path
) -> None:
    fake(record=str(record))
    with socket.create_server(("127.0.0.1", 0)) as other:
        options = ServeOptions(base, port=other.getsockname()[1])
        with (
            pytest.raises(GraftError, match="cannot listen"),
            managed_server(options, tmp_path / "vllm.log"),
        ):
            pytest.fail("the block was entered")
    assert not record.exists()


@contextmanager
def serving(
    site: Path, checkpoint: Path, *words: str, **settings: object
) -> Iterator[subprocess.Popen[str]]:
    """Run `mtp-graft serve` on a free port as a user would."""
    command = [sys.executable, "-m", "mtp_graft.cli", "serve", str(checkpoint), "--port", "0"]
    environment = command_environment(site, **settings)
    with subprocess.Popen(
        [*command, *words], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until_ready(process: subprocess.Popen[str], where: str = "http://127.0.0.1:") -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"ready: {where}"):
            return
    pytest.fail("the server never got ready")


@pytest.mark.usefixtures("hangup_ends")
@pytest.mark.parametrize(
    ("signum", "status"),
    # Neither vLLM nor the stand-in handles SIGHUP: they die of it.
    [(signal.SIGINT, 5), (signal.SIGTERM, 5), (signal.SIGHUP, 128 + signal.SIGHUP)],
)
def test_serve_passes_signals_on_and_exits_with_the_servers_status(
    vllm: object, site: Path, base: Path, record: Path, signum: int, status: int
) -> None:
    with serving(site, base, record=str(record), exit_status=5) as process:
        wait_until_ready(process)
        process.send_signal(signum)
        assert process.wait(20) == status
    assert wait_gone(read_record(record)["pids"]) == []


def test_serve_that_is_killed_takes_the_server_along(
    vllm: object, site: Path, base: Path, record: Path
) -> None:
    with serving(site, base, record=str(record)) as process:
        wait_until_ready(process)
        process.kill()
    assert wait_gone(read_record(record)["pids"]) == []


def test_a_signal_during_the_first_completion_is_not_waited_out(
    vllm: object, site: Path, base: Path, record: Path, tmp_path: Path
) -> None:
    """vLLM waits for its clients to hang up, and `serve` is one until a completion came back."""
    asked = tmp_path / "asked"
    settings = {"record": str(record), "requests": str(asked), "mode": "drains", "exit_status": 5}
    with serving(site, base, **settings) as process:
        while not asked.exists() or not asked.read_text():
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 5
    assert wait_gone(read_record(record)["pids"]) == []


def test_serve_under_nohup_outlives_the_terminal(
    vllm: object, site: Path, base: Path, record: Path, hangup_ends: None
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with serving(site, base, record=str(record)) as process:
        wait_until_ready(process)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert wait_gone(read_record(record)["pids"]) == []


def test_a_second_signal_kills_a_server_that_does_not_stop(
    vllm: object, site: Path, base: Path, record: Path
) -> None:
    with serving(site, base, record=str(record), mode="ignores_sigterm") as process:
        wait_until_ready(process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGKILL
    assert wait_gone(read_record(record)["pids"]) == []


@pytest.mark.parametrize(("mode", "status"), [("dies", 3), ("refuses", 1)])
def test_serve_does_not_call_a_server_ready_that_gives_no_completion(
    vllm: object, site: Path, base: Path, record: Path, mode: str, status: int
) -> None:
    with serving(site, base, mode=mode, record=str(record)) as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "ready:" not in errors
    assert "Traceback" not in errors
    assert ("error: http://127.0.0.1:" in errors) is (mode == "refuses")
    assert wait_gone(read_record(record)["pids"]) == []


def test_a_headless_node_is_ready_when_it_runs(vllm: object, site: Path, grafted: Path) -> None:
    """A further machine of several has no endpoint to ask."""
    words = ("--", "--headless")
    with serving(site, grafted, *words, mode="never_healthy") as process:
        wait_until_ready(process, "headless; the first machine answers")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, 143)  # 143: vLLM ended before it minded signals


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "one\n\n\x1b[31mINFO 11-23 20:00:00 [a.py:3] two\x1b[0m\nthree\nfour\n",
            "two | three | four",
        ),
        (
            "usage: vllm serve\n  [--host]\nvllm: error: unrecognized: --x\n",
            "vllm: error: unrecognized: --x",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, max_model_len (100000) is greater than 8192\n",
            "Value error, max_model_len (100000) is greater than 8192",
        ),
        ("", "it wrote nothing"),
    ],
)
def test_a_log_says_why_the_server_stopped(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "vllm.log").write_text(text)
    assert explain(tmp_path / "vllm.log") == reason
