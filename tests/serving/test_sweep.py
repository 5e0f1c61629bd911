"""Loads of several requests at a time: the engine's client on a stand-in server."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench import sweep
from mtp_graft.bench.sweep import SweepConfig, measure_sweep
from mtp_graft.errors import GraftError
from mtp_graft.serving import command
from mtp_graft.serving.client import ServerClient

from .bench_server import PROMPTS, quiet, serving


@pytest.mark.vllm
def test_each_load_has_a_point_with_its_own_server_for_each_k(
    fake: Callable[..., None], vllm: object, grafted: Path, tmp_path: Path
) -> None:
    fake(step_s=0.002, accepts=[2, 0], streams=str(tmp_path / "streams"), fails={"14": "500"})
    started = []

    @contextmanager
    def serve(k: int) -> Iterator[ServerClient]:
        started.append(k)
        with serving(grafted, k) as client, pytest.MonkeyPatch.context() as patch:
            patch.setenv(
                "PYTHONPATH", os.pathsep.join(sys.path)
            )  # the engine itself, as its client
            yield client

    config = SweepConfig((3, 1), (2,), max_tokens=20, num_requests=3)
    first, second = measure_sweep(serve, PROMPTS, config, quiet)["points"]
    assert started == [2]
    assert [(p["k"], p["concurrency"]) for p in (first, second)] == [(2, 1), (2, 3)]
    # Of three and nine requests; warm-ups are not counted, and one of concurrency 3 fails.
    assert (first["requests"], first["errors"], first["tokens"]) == (3, 0, 3 * 20)
    assert (second["requests"], second["errors"]) == (8, 1)
    assert second["failures"] == ["Internal Server Error"]
    # 20 tokens: one from prefill, then 3, 1, ..., 3: 9 steps of which 5 accept both drafts.
    assert first["accepted_by_position"] == [3 * 5, 3 * 5]
    assert first["acceptance_by_position"] == pytest.approx([5 / 9, 1.0])
    assert first["acceptance"] == pytest.approx(5 / 9)
    assert second["per_stream_tok_s"] < second["aggregate_tok_s"] < 3 * 19 / 9 / 0.002
    assert second["ttft_ms"] >= 2
    asked = [int(line) for line in (tmp_path / "streams").read_text().split()]
    assert set(asked) == {sum(b"ab"), sum(b"hello")}, "the prompts are the server's own tokens"


FOUND = {
    **{"errors": ["", "Traceback\n  File x\nOSError: gone\n"], "completed": 1},
    **{"median_tpot_ms": 200.0, "median_ttft_ms": 500.0, "output_throughput": 4.0},
    **{"total_output_tokens": 11, "duration": 2.75},
}


@pytest.fixture
def loads(vllm: object, monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Note what vLLM's client is told; its answer is `FOUND`."""
    told: list[Mapping[str, Any]] = []

    def run_load(_url: str, load: Mapping[str, Any]) -> dict[str, Any]:
        told.append(load)
        return FOUND

    monkeypatch.setattr(sweep, "run_load", run_load)
    return told


class Tokenizing(ServerClient):
    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


@contextmanager
def tokenizing(_k: int) -> Iterator[ServerClient]:
    yield Tokenizing("http://127.0.0.1:9", "key")


def test_a_point_is_made_of_the_requests_that_were_answered(loads: list[Any]) -> None:
    config = SweepConfig((2,), (0,), max_tokens=11, num_requests=1, temperature=0.5)
    [point] = measure_sweep(tokenizing, PROMPTS, config, quiet, api_key="key")["points"]
    assert point["per_stream_tok_s"] == pytest.approx(5.0)
    assert (point["aggregate_tok_s"], point["ttft_ms"]) == (4.0, 500.0)
    assert (point["errors"], point["failures"]) == (1, ["OSError: gone"])
    assert point["acceptance"] is None and point["k"] == 0
    [load] = loads
    assert load["prompts"] == [list(b"ab"), list(b"hello")]
    words = " ".join(load["arguments"])
    for option in ("--max-concurrency 2", "--num-prompts 2", "--temperature 0.5", "--ignore-eos"):
        assert option in words
    assert "--header Authorization=Bearer key" in words


def test_points_of_earlier_calls_are_not_measured_again(loads: list[Any], tmp_path: Path) -> None:
    def measured(concurrencies: tuple[int, ...], *ks: int) -> list[tuple[int, int]]:
        config = SweepConfig(concurrencies, ks)
        points = measure_sweep(tokenizing, PROMPTS, config, quiet, tmp_path)["points"]
        return [(point["k"], point["concurrency"]) for point in points]

    assert measured((1, 3), 1) == [(1, 1), (1, 3)]
    assert measured((3, 2, 1), 1, 0) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert len(loads) == 6


def test_what_cannot_be_measured_is_an_error(vllm: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure() -> None:
        measure_sweep(tokenizing, PROMPTS, SweepConfig((2,), (1,)), quiet)

    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GraftError, match=r"vllm bench serve failed against http://127\.0\.0\.1:9"):
        measure()
    failed = FOUND | {"errors": ["refused", "refused"], "completed": 0}
    monkeypatch.setattr(sweep, "run_load", lambda *_: failed)
    with pytest.raises(GraftError, match=r"concurrency 2: every request failed.*refused"):
        measure()
    monkeypatch.setattr(command, "installed_vllm", lambda: None)
    with pytest.raises(GraftError, match=r"vLLM is not installed .* pip install"):
        measure()
