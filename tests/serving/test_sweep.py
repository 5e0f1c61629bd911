"""Loads of several requests at a time: the engine's client on a stand-in server."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench import sweep
from mtp_graft.bench.decode import DecodeConfig
from mtp_graft.bench.sweep import measure_sweep
from mtp_graft.errors import GraftError
from mtp_graft.serving import command
from mtp_graft.serving.client import Prompt, ServerClient

from .bench_server import PROMPTS, quiet, serving


@pytest.mark.vllm
def test_vllms_own_client_holds_the_load(
    fake: Callable[..., None], grafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(step_s=0.002, accepts=[2, 0], streams=str(tmp_path / "streams"), fails={"5": "500"})

    @contextmanager
    def serve(k: int) -> Iterator[ServerClient]:
        with serving(grafted, k) as client:
            monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the engine's client
            yield client

    config = DecodeConfig(max_tokens=20, rounds=3)
    [point] = measure_sweep(serve, PROMPTS, [2], [3], config, quiet)["points"]
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
    **{"errors": ["", "Traceback\n  File x\nOSError: gone\n"], "output_lens": [11, 0]},
    **{"ttfts": [0.5, 0.0], "latencies": [2.5, 0.0], "output_throughput": 4.0},
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
    def encode(self, prompt: Prompt) -> list[int]:
        assert isinstance(prompt.content, str)
        return list(prompt.content.encode())


@contextmanager
def tokenizing(_k: int) -> Iterator[ServerClient]:
    yield Tokenizing("http://127.0.0.1:9", "key")


def test_a_point_is_made_of_the_requests_that_were_answered(loads: list[Any]) -> None:
    config = DecodeConfig(max_tokens=11, rounds=1, temperature=0.5)
    result = measure_sweep(tokenizing, PROMPTS, [0], [2], config, quiet, api_key="key")
    [point] = result["points"]
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
    def measured(loads: list[int], *ks: int) -> list[tuple[int, int]]:
        found = measure_sweep(tokenizing, PROMPTS, ks, loads, DecodeConfig(), quiet, tmp_path)
        return [(point["k"], point["concurrency"]) for point in found["points"]]

    assert measured([1, 3], 1) == [(1, 1), (1, 3)]
    assert measured([3, 2, 1], 1, 0) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert len(loads) == 6
    assert len(measured([1], 1)) == 6, "the result has all points of the folder"


def test_what_cannot_be_measured_is_an_error(vllm: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure() -> None:
        measure_sweep(tokenizing, PROMPTS, [1], [2], DecodeConfig(), quiet)

    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GraftError, match=r"vllm bench serve failed against http://127\.0\.0\.1:9"):
        measure()
    failed = FOUND | {"errors": ["refused", "refused"]}
    monkeypatch.setattr(sweep, "run_load", lambda *_: failed)
    with pytest.raises(GraftError, match=r"concurrency 2: every request failed.*refused"):
        measure()
    monkeypatch.setattr(command, "installed_vllm", lambda: None)
    with pytest.raises(GraftError, match=r"vLLM is not installed .* pip install"):
        measure()
