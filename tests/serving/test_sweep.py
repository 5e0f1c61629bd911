"""Loads of several requests at a time: the engine's client on a stand-in server."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mtp_graft.bench import sweep
from mtp_graft.bench.decode import DecodeConfig
from mtp_graft.bench.sweep import measure_sweep, run_load
from mtp_graft.errors import GraftError
from mtp_graft.serving import command
from mtp_graft.serving.client import ServerClient

from .bench_server import PROMPTS, quiet, serving


@pytest.mark.vllm
def test_vllms_own_client_holds_the_load(
    fake: Callable[..., None], grafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(step_s=0.002, accepts=[2, 0], streams=str(tmp_path / "streams"), fails=[5])
    config = DecodeConfig(max_tokens=20, rounds=3)
    with serving(grafted, 2) as client:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the engine's client
        served = nullcontext(client)
        found = measure_sweep(lambda _k: served, PROMPTS, [2], [3], config, quiet, tmp_path / "run")
    [point] = found["points"]
    # Of nine requests; warm-ups are not counted, and one fails.
    assert (point["requests"], point["errors"], point["tokens"]) == (8, 1, 8 * 20)
    assert point["failures"] == ["Internal Server Error"]
    # 20 tokens: one from prefill, then 3, 1, ..., 3: 9 steps of which 5 accept both drafts.
    assert point["accepted_by_position"] == [8 * 5, 8 * 5]
    assert point["acceptance_by_position"] == pytest.approx([5 / 9, 1.0])
    assert point["per_stream_tok_s"] < point["aggregate_tok_s"] < 3 * 19 / 9 / 0.002
    assert point["ttft_ms"] >= 2
    asked = {int(line) for line in (tmp_path / "streams").read_text().split()}
    assert asked == {sum(b"ab"), sum(b"hello")}, "the prompts are the server's own tokens"


FOUND = {
    "errors": ["", "Traceback\n  File x\nOSError: gone\n"],
    "output_lens": [11, 0],
    "ttfts": [0.5, 0.0],
    "latencies": [2.5, 0.0],
    "output_throughput": 4.0,
    "total_output_tokens": 11,
    "duration": 2.75,
}


@pytest.fixture
def client(vllm: object, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for vLLM's client, whose answer is `FOUND`."""
    client = Mock(return_value=FOUND)
    monkeypatch.setattr(sweep, "run_load", client)
    monkeypatch.setattr(ServerClient, "encode", lambda _self, prompt: list(prompt.content.encode()))
    return client


def measure(folder: Path, *ks: int, loads: Sequence[int] = (2,)) -> list[dict[str, Any]]:
    server = nullcontext(ServerClient("http://127.0.0.1:9", "key"))
    config = DecodeConfig(max_tokens=11, rounds=1, temperature=0.5)
    found = measure_sweep(lambda _k: server, PROMPTS, ks, loads, config, quiet, folder)
    points: list[dict[str, Any]] = found["points"]
    return points


def test_a_point_is_made_of_the_requests_that_were_answered(client: Mock, tmp_path: Path) -> None:
    [point] = measure(tmp_path, 0)
    assert point["per_stream_tok_s"] == pytest.approx(5.0)
    assert (point["aggregate_tok_s"], point["ttft_ms"]) == (4.0, 500.0)
    assert (point["errors"], point["failures"]) == (1, ["OSError: gone"])
    assert point["acceptance"] is None and point["k"] == 0
    _, load = client.call_args.args
    assert load["prompts"] == [list(b"ab"), list(b"hello")]
    words = " ".join(load["arguments"])
    for option in ("--max-concurrency=2", "--num-prompts=2", "--temperature=0.5", "--ignore-eos"):
        assert option in words
    assert "--header Authorization=Bearer key" in words


def test_a_point_without_an_answered_request_is_an_error(client: Mock, tmp_path: Path) -> None:
    client.return_value = FOUND | {"errors": ["refused", "refused"]}
    with pytest.raises(GraftError, match=r"concurrency 2: every request failed.*refused"):
        measure(tmp_path, 1)


def test_without_vllm_or_its_client_nothing_is_measured(
    vllm: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GraftError, match=r"vllm bench serve failed against http://127\.0\.0\.1:9"):
        run_load("http://127.0.0.1:9", {})
    monkeypatch.setattr(command, "installed_vllm", lambda: None)
    with pytest.raises(GraftError, match=r"vLLM is not installed .* pip install"):
        measure(tmp_path, 1)
