"""Loads of several requests at a time: the engine's client on a stand-in server."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench import sweep
from mtp_graft.bench.requests import Session
from mtp_graft.bench.sweep import SweepConfig, measure_sweep
from mtp_graft.errors import GraftError
from mtp_graft.serving import command, server
from mtp_graft.serving.client import ServerClient

from .bench_server import PROMPTS, quiet, serving


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL_S", 0.02)


class Servers:
    """Serves a checkpoint for each k, and notes which were started.

    The server is the stand-in. What is started beside it, the engine's client, imports what this
    process does.
    """

    def __init__(self, checkpoint: Path, log: Path) -> None:
        self.checkpoint, self.log = checkpoint, log
        self.started: list[int] = []

    @contextmanager
    def __call__(self, k: int) -> Iterator[ServerClient]:
        self.started.append(k)
        with (
            serving(self.checkpoint, self.log, k) as client,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            yield client


@pytest.mark.vllm
def test_each_load_has_a_point_with_its_own_server_for_each_k(
    fake: Callable[..., None], vllm: object, grafted: Path, tmp_path: Path
) -> None:
    fake(step_s=0.002, accepts=[2, 0], streams=str(tmp_path / "streams"), fails={"14": "500"})
    servers = Servers(grafted, tmp_path / "vllm.log")
    config = SweepConfig((3, 1), (2,), max_tokens=20, num_requests=3)
    first, second = measure_sweep(servers, PROMPTS, config, quiet, Session())["points"]
    assert servers.started == [2]
    assert [(p["k"], p["concurrency"]) for p in (first, second)] == [(2, 1), (2, 3)]
    # Of three and nine requests; warm-ups are not counted, and one of concurrency 1 fails.
    assert (first["requests"], first["errors"]) == (2, 1)
    assert (second["requests"], second["errors"], second["tokens"]) == (9, 0, 9 * 20)
    assert first["failures"] == ["Internal Server Error"]
    # 20 tokens: one from prefill, then 3, 1, ..., 3: 9 steps of which 5 accept both drafts.
    assert second["accepted_by_position"] == [9 * 5, 9 * 5]
    assert second["acceptance_by_position"] == pytest.approx([5 / 9, 1.0])
    assert second["acceptance"] == pytest.approx(5 / 9)
    assert second["per_stream_tok_s"] < second["aggregate_tok_s"] < 3 * 19 / 9 / 0.002
    assert second["ttft_ms"] >= 2
    asked = [int(line) for line in (tmp_path / "streams").read_text().split()]
    assert set(asked) == {sum(b"ab"), sum(b"hello")}, "the prompts are the server's own tokens"


def found(**other: Any) -> dict[str, Any]:
    """Return the part of vLLM's result that is read, of two requests, one of them failed."""
    return {
        "output_lens": [11, 0],
        "ttfts": [0.5, 0.0],
        "latencies": [2.5, 0.0],
        "errors": ["", "Traceback\n  File x\nOSError: gone\n"],
        "output_throughput": 4.0,
        "total_output_tokens": 11,
        "duration": 2.75,
        **other,
    }


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Note what vLLM's client is told; its answer is `found`."""
    told: list[Mapping[str, Any]] = []

    def run_load(load: Mapping[str, Any]) -> dict[str, Any]:
        told.append(load)
        return found()

    monkeypatch.setattr(sweep, "vllm_bench", lambda *_: nullcontext(run_load))
    return told


class Tokenizing(ServerClient):
    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9", "key")

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


def test_a_point_is_made_of_the_requests_that_were_answered(loads: list[Any]) -> None:
    config = SweepConfig((2,), (0,), max_tokens=11, num_requests=1, temperature=0.5)
    result = measure_sweep(
        lambda _k: nullcontext(Tokenizing()), PROMPTS, config, quiet, Session(), "key"
    )
    [point] = result["points"]
    assert point["per_stream_tok_s"] == pytest.approx(10 / 2.0)
    assert (point["aggregate_tok_s"], point["ttft_ms"]) == (4.0, 500.0)
    assert (point["errors"], point["failures"]) == (1, ["OSError: gone"])
    assert point["acceptance"] is None and point["k"] == 0
    [load] = loads
    assert load["prompts"] == [list(b"ab"), list(b"hello")]
    words = " ".join(load["arguments"])
    for option in ("--max-concurrency 2", "--num-prompts 2", "--temperature 0.5", "--ignore-eos"):
        assert option in words
    assert "--header Authorization=Bearer key" in words


def test_points_of_earlier_calls_are_not_measured_again_and_stay(loads: list[Any]) -> None:
    session = Session()

    def measured(*concurrencies: int, k: int = 1) -> list[tuple[int, int]]:
        config = SweepConfig(concurrencies, (k,))
        points = measure_sweep(
            lambda _k: nullcontext(Tokenizing()), PROMPTS, config, quiet, session
        )["points"]
        return [(point["k"], point["concurrency"]) for point in points]

    assert measured(1, 3) == [(1, 1), (1, 3)]
    assert measured(3, 2) == [(1, 1), (1, 2), (1, 3)]
    assert measured(2, k=0) == [(0, 2), (1, 1), (1, 2), (1, 3)]
    assert len(loads) == 4


def test_a_point_without_an_answer_and_a_client_that_ends_are_errors(
    vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure() -> dict[str, Any]:
        tokenizing, config = nullcontext(Tokenizing()), SweepConfig((2,), (1,))
        return measure_sweep(lambda _k: tokenizing, PROMPTS, config, quiet, Session())

    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GraftError, match=r"vllm bench serve ended against http://127\.0\.0\.1:9"):
        measure()
    failed = found(errors=["refused", "refused"])
    monkeypatch.setattr(sweep, "vllm_bench", lambda *_: nullcontext(lambda _load: failed))
    with pytest.raises(GraftError, match=r"concurrency 2: every request failed.*refused"):
        measure()


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "installed_vllm", lambda: None)
    config = SweepConfig((1,), (1,))
    with pytest.raises(GraftError, match=r"vLLM is not installed .* pip install"):
        measure_sweep(lambda _k: nullcontext(Tokenizing()), PROMPTS, config, quiet, Session())
