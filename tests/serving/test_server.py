"""Starting vLLM, stopping it, what is said if it does not start, and that nothing of it is left."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_graft.errors import GraftError
from mtp_graft.serving import server
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import START_LIMIT, ServeOptions, build_command
from mtp_graft.serving.server import check_drafter, explain, managed_server

from .conftest import left_behind, read_record

Configure = Callable[..., None]
Managed = Callable[..., AbstractContextManager[ServerClient]]
RECORD = Path("record.json")
Serve = Callable[..., AbstractContextManager[subprocess.Popen[str]]]


@pytest.fixture
def managed(fake: Configure, tmp_path: Path) -> Managed:
    """Return `managed_server` with the stand-in, of which nothing may be left afterwards."""

    @contextmanager
    def start(checkpoint: Path, port: int = 0, **settings: object) -> Iterator[ServerClient]:
        fake(record=str(RECORD), **settings)
        options = ServeOptions(checkpoint, port=port)
        try:
            with managed_server(options, tmp_path / "log" / "vllm.log") as client:
                yield client
        finally:
            assert not RECORD.exists() or left_behind(RECORD) == []

    return start


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "dies"}, r"base: vLLM ended with status 3 .*vllm\.log: KeyError: 'c1a'$"),
        ({"dies_at": 1}, "status 7 .*RuntimeError: died in the middle"),
        ({"mode": "refuses"}, "status 500.*no such kernel"),  # healthy is not ready
        ({"mode": "never_healthy"}, "is not ready after 2 s"),
    ],
)
def test_a_server_that_does_not_get_ready_is_explained(
    managed: Managed, base: Path, settings: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings.get("mode") == "never_healthy":
        monkeypatch.setenv(START_LIMIT, "2")
    with pytest.raises(GraftError, match=message), managed(base, **settings):
        pytest.fail("the block was entered")


def test_weights_get_their_time(vllm: object, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(base / "model-1.safetensors", 150 * 10**9)  # sparse
    assert server.start_limit_s(base) > 1500
    assert build_command(ServeOptions(base)).env[START_LIMIT] == str(server.start_limit_s(base))
    monkeypatch.setenv(START_LIMIT, "7")
    assert server.start_limit_s(base) == 7
    monkeypatch.setenv(START_LIMIT, "soon")
    with pytest.raises(GraftError, match="'soon', expected whole seconds"):
        build_command(ServeOptions(base))


@pytest.fixture
def hangup_ends() -> Iterator[None]:
    """SIGHUP as in a terminal, also where the tests run under `nohup`; processes inherit it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup_ends")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_server_too_also_one_that_ignores_sigterm(
    managed: Managed, base: Path, signum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "GRACE_S", 0.3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, managed(base, mode="ignores_sigterm"):
        signal.raise_signal(signum)
        pytest.fail("the block went on")
    assert ended.value.code == 128 + signum
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_taken_port_is_an_error_at_once(managed: Managed, base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(GraftError, match="cannot listen"), managed(base, port=port):
            pytest.fail("the block was entered")
    assert not RECORD.exists()


def test_the_check_reads_its_own_drafts_alone(managed: Managed, grafted: Path, base: Path) -> None:
    with managed(grafted) as client:
        client.complete([1, 2, 3], 50)  # somebody was here before
        found = check_drafter(client)
    # The stand-in makes 128 tokens: one from the prompt, then two and one a step in turn.
    assert (found.num_draft_tokens, found.num_accepted_tokens) == (85, 43)
    with managed(base) as client, pytest.raises(GraftError, match="does not draft"):
        check_drafter(client)


@pytest.fixture
def serve(fake: Configure, hangup_ends: None) -> Serve:
    """Return `mtp-graft serve` on a free port as a user runs it; nothing of it may be left."""

    @contextmanager
    def run(checkpoint: Path, *words: str, **settings: object) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "mtp_graft.cli", "serve", str(checkpoint), "--port", "0"]
        fake(record=str(RECORD), **settings)
        with subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()
        assert left_behind(RECORD) == []

    return run


def wait_until_ready(process: subprocess.Popen[str], where: str = "http://127.0.0.1:") -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"ready: {where}"):
            return
    pytest.fail("the server never got ready")


def assert_goes_on(process: subprocess.Popen[str], seconds: float) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(seconds)


@pytest.mark.parametrize(
    ("signums", "mode", "status"),
    [
        *(([signum], "ok", 5) for signum in (signal.SIGINT, signal.SIGHUP)),
        ([signal.SIGKILL], "ok", -signal.SIGKILL),
        ([signal.SIGINT, signal.SIGINT], "ignores_sigterm", 128 + signal.SIGINT),
    ],
)
def test_signals_stop_serve(serve: Serve, base: Path, signums: Any, mode: str, status: int) -> None:
    with serve(base, exit_status=5, mode=mode) as process:
        wait_until_ready(process)
        for signum in signums[:-1]:
            process.send_signal(signum)
            assert_goes_on(process, 0.3)
        process.send_signal(signums[-1])
        assert process.wait(20) == status


def test_a_signal_ends_the_first_completion(serve: Serve, base: Path, tmp_path: Path) -> None:
    """vLLM waits for its clients to hang up, and `serve` is one until a completion came back."""
    asked = tmp_path / "asked"
    with serve(base, requests=str(asked), mode="drains", exit_status=5) as process:
        while not asked.exists() or not asked.read_text():
            assert_goes_on(process, 0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 5


def test_serve_under_nohup_outlives_the_terminal(serve: Serve, base: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with serve(base) as process:
        wait_until_ready(process)
        process.send_signal(signal.SIGHUP)
        assert_goes_on(process, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize(("mode", "status"), [("dies", 3), ("refuses", 1)])
def test_serve_waits_for_a_completion(serve: Serve, base: Path, mode: str, status: int) -> None:
    with serve(base, mode=mode) as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "ready:" not in errors
    assert "Traceback" not in errors
    assert ("error: http://127.0.0.1:" in errors) is (mode == "refuses")


def test_a_headless_node_is_ready_when_it_runs(serve: Serve, grafted: Path) -> None:
    """A further machine of several has no endpoint to ask."""
    with serve(grafted, "--", "--headless", mode="never_healthy") as process:
        wait_until_ready(process, "headless; the first machine answers")
        read_record(RECORD)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, 143)  # 143: vLLM ended before it minded signals


FRAMES = 'Traceback (most recent call last):\n  File "a.py", line 1\n    g(x % 2)\n      ~~^~~\n'
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\n\nFree memory: 1 GiB."
ENGINE_FAILED = "(APIServer pid=5) RuntimeError: Engine core initialization failed. {0}\n"


def of_ranks(*messages: str) -> str:
    """Return a log that ranks wrote at the same time, a line in turn."""
    start = "(Worker_TP{0} pid=1{0}) ERROR 11-30 15:00:00 [multiproc_executor.py:772] {1}\n"
    lines = zip_longest(*(message.split("\n") for message in messages), fillvalue="")
    return "".join(start.format(*numbered) for turn in lines for numbered in enumerate(turn))


TEXT = st.text("abcdef ,.:'()[]{}=<>/0123456789", min_size=1).filter(str.strip)


@given(
    st.sampled_from(["ValueError", "pydantic_core._pydantic_core.ValidationError", "a.b.HubError"]),
    st.lists(st.tuples(st.sampled_from(["", "  ", "    "]), TEXT), min_size=1, max_size=6),
    st.integers(0, 3),
    st.sampled_from(["", ENGINE_FAILED, "INFO:     Shutting down\n"]),
)
def test_every_line_of_a_reason_is_told(kind: str, said: Any, ranks: int, after: str) -> None:
    message = f"{kind}: " + "\n".join(indent + text for indent, text in said)
    logged = of_ranks(*[FRAMES + message] * ranks) or f"{FRAMES}{message}\n"
    with TemporaryDirectory() as name:
        (log := Path(name, "vllm.log")).write_text(logged + after)
        assert explain(log) == " ".join(message.split())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("one\n\ntwo\nthree\nfour\n", "two | three | four"),
        ("usage: vllm serve\n  [--host]\nvllm: error: no --x\n", "vllm: error: no --x"),
        (
            f"{FRAMES}pydantic.ValidationError: 2 errors for X\na.b\n  Too small\nc\n  Value error,"
            " so\n/lib/tracker.py:2: UserWarning: leaked\n  warnings.warn(\n",
            "pydantic.ValidationError: 2 errors for X a.b Too small c Value error, so",
        ),
        (
            of_ranks(f"failed\n{FRAMES}{OOM}", f"{FRAMES}jinja2.TemplateNotFound: x")
            + "Exception: WorkerProc failed. See stack trace for root cause.\n"
            + ENGINE_FAILED,
            f"{' '.join(OOM.split())} | jinja2.TemplateNotFound: x",
        ),
        (ENGINE_FAILED.format("{'EngineCore_0': -9}"), r".* failed\. {'EngineCore_0': -9}"),
        (f"[rank0]: {FRAMES}\x1b[31mAssertionError\x1b[0m\n", r"g\(x % 2\) \| AssertionError"),
        (
            f"{FRAMES}KeyError: 'a'\n\nThe above exception was the direct cause of the following "
            f"exception:\n\n{FRAMES}OSError: no tokenizer\nINFO:     Shutting down\n",
            "KeyError: 'a' | OSError: no tokenizer",
        ),
        ("progress 1\rRuntimeError: a\u2028b\n", "RuntimeError: a b"),
        ("ValueError: " + "x " * 9000, r"ValueError: (x ){100,2000}\.\.\."),
        ("", "it wrote nothing"),
    ],
)
def test_a_log_says_why_the_server_stopped(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "vllm.log").write_text(text)
    found = explain(tmp_path / "vllm.log")
    assert found == reason or re.fullmatch(reason, found)
