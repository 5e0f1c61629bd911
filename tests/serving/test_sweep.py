"""Loads of several streams on a stand-in server whose steps are known."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench.charts import sweep_chart
from mtp_graft.bench.ledger import open_ledger
from mtp_graft.bench.streams import BenchClient, Retrying
from mtp_graft.bench.sweep import SweepConfig, best_k, dips, measure_sweep
from mtp_graft.errors import GraftError
from mtp_graft.serving import server
from mtp_graft.serving.client import Completion, ServerClient
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.prompts import Prompt

PROMPTS = [Prompt("a", "ab"), Prompt("b", "hello")]


def quiet(_label: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL_S", 0.02)


class Servers:
    """Serves a checkpoint for each k, and notes which were started."""

    def __init__(self, checkpoint: Path, log: Path, silence_s: float = 5.0) -> None:
        self.checkpoint, self.log, self.silence_s = checkpoint, log, silence_s
        self.started: list[int | None] = []

    @contextmanager
    def __call__(self, k: int | None) -> Iterator[BenchClient]:
        self.started.append(k)
        options = ServeOptions(self.checkpoint, port=0, num_speculative_tokens=k)
        with (
            server.managed_server(options, self.log) as running,
            BenchClient(running.base_url, silence_s=self.silence_s) as client,
        ):
            yield client


def sweep(servers: Any, config: SweepConfig, run: Path | None = None) -> dict[str, Any]:
    with open_ledger(run, {}) as ledger:
        return measure_sweep(
            servers, PROMPTS, config, quiet, ledger, lambda: Retrying(attempts=2, wait_s=0.0)
        )


def test_each_load_has_a_point_with_its_own_server_for_each_k(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake(step_s=0.002)
    servers = Servers(grafted, tmp_path / "vllm.log")
    config = SweepConfig(streams=(1, 3), ks=(0, 1), max_tokens=20, requests_per_stream=3)
    points = sweep(servers, config)["points"]
    assert servers.started == [0, 1]
    assert [(p["k"], p["concurrency"]) for p in points] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert [p["acceptance"] is None for p in points] == [True, True, False, False]
    assert [p["acceptance_by_position"] is None for p in points] == [True, True, False, False]
    for point in points:
        assert point["requests"] >= 3 * point["concurrency"]
        assert point["errors"] == 0
        low, high = point["aggregate_interval"]
        assert low < point["aggregate_tok_s"] < high
        # How fast, the next test says: a client that had to wait for a core reads many at once.
        assert point["per_stream_tok_s"] > 0


class Steady(ServerClient):
    """Answers by itself, a token every 2 ms, and notes how many requests run at a time."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9")
        self.lock = threading.Lock()
        self.running = 0
        self.seen: list[int] = []  # how many run, after each begin and end
        self.max_tokens: list[int] = []

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def spec_decode_counters(self) -> None:
        return None

    def change(self, by: int) -> None:
        with self.lock:
            self.running += by
            self.seen.append(self.running)

    def stream(self, prompt: Any, max_tokens: int, **_: Any) -> Completion:
        started = time.perf_counter()
        self.change(+1)
        self.max_tokens.append(max_tokens)
        chunks = []
        for _ in range(max_tokens):
            time.sleep(0.002)
            chunks.append((time.perf_counter(), 1))
        self.change(-1)
        return Completion((7,) * max_tokens, "length", started, tuple(chunks))


@contextmanager
def running(client: ServerClient) -> Iterator[ServerClient]:
    yield client


def test_the_load_stays_what_it_is_called_until_the_last_measured_request() -> None:
    client = Steady()
    config = SweepConfig(streams=(4,), max_tokens=40, requests_per_stream=3)
    (point,) = sweep(lambda _k: running(client), config)["points"]
    assert point["requests"] >= 12
    # Warm-up requests are of different lengths, so that the streams do not go in step.
    assert sorted(client.max_tokens[:4]) == [10, 20, 30, 40]
    # From the first to the last moment with all four, at most one or two are between two requests.
    numbers = client.seen
    assert max(numbers) == 4
    first, last = numbers.index(4), len(numbers) - 1 - numbers[::-1].index(4)
    assert min(numbers[first:last]) >= 2
    # Then the window has ended, and each stream ends what it has begun; one or two may just have
    # looked whether it has.
    assert numbers[-1] == 0 and sum(b > a for a, b in pairwise(numbers[last:])) <= 2
    # However fast the machine is at the moment, the streams decode side by side.
    slowest, fastest = point["per_stream_spread"]
    assert point["aggregate_tok_s"] == pytest.approx(point["tokens"] / point["seconds"])
    assert 0.8 * 3 * slowest < point["aggregate_tok_s"] < 1.2 * 4 * fastest


@pytest.mark.parametrize(
    ("failure", "kind"), [("500", "refused"), ("hangs", "timeout"), ("closes", "broken")]
)
def test_failures_are_counted_at_their_point_and_asked_again(
    fake: Callable[..., None], grafted: Path, tmp_path: Path, failure: str, kind: str
) -> None:
    fake(fails={"3": failure}, step_s=0.001)  # the warm-ups are 1 and 2
    servers = Servers(grafted, tmp_path / "vllm.log", silence_s=0.5)
    config = SweepConfig(streams=(2,), ks=(1,), max_tokens=8, requests_per_stream=4)
    (point,) = sweep(servers, config)["points"]
    assert point["errors"] == 1
    assert [(found["attempt"], found["kind"]) for found in point["failures"]] == [(1, kind)]
    assert point["requests"] >= 8, "what failed was asked again"
    assert point["tokens"] >= 8 * 8


@pytest.mark.parametrize(
    ("path", "request_"), [("/tokenize", "tokenize a"), ("/metrics", "2 streams: counters")]
)
def test_a_refused_request_beside_the_load_is_counted_and_asked_again(
    fake: Callable[..., None], grafted: Path, tmp_path: Path, path: str, request_: str
) -> None:
    fake(refuses_first={path: 1})
    config = SweepConfig(streams=(2,), ks=(1,), max_tokens=8, requests_per_stream=2)
    (point,) = sweep(Servers(grafted, tmp_path / "vllm.log"), config)["points"]
    assert [failure["request"] for failure in point["failures"]] == [request_]
    assert point["acceptance"] is not None


class FailsLate(Steady):
    """Fails every request that is in flight when the window has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.num_readings = 0

    def spec_decode_counters(self) -> None:
        self.num_readings += 1
        if self.num_readings == 2:
            time.sleep(0.1)  # longer than a request: the other stream has begun one

    def stream(self, prompt: Any, max_tokens: int, **_: Any) -> Completion:
        completion = super().stream(prompt, max_tokens)
        if self.num_readings == 2:
            raise GraftError("out of luck")
        return completion


def test_a_request_that_nobody_measures_may_fail() -> None:
    client = FailsLate()
    config = SweepConfig(streams=(2,), max_tokens=20, requests_per_stream=2)
    (point,) = sweep(lambda _k: running(client), config)["points"]
    assert point["requests"] >= 4
    assert point["errors"] == 2, "both attempts of the other stream's last request"


def test_a_request_that_always_fails_ends_the_sweep_and_its_point_is_not_kept(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake(fails={str(n): "500" for n in range(20, 400)})
    servers = Servers(grafted, tmp_path / "vllm.log")
    config = SweepConfig(streams=(1, 2), ks=(1,), max_tokens=8, requests_per_stream=12)
    with pytest.raises(GraftError, match=r"2 streams: .: failed 2 times in a row"):
        sweep(servers, config, tmp_path / "run")
    units = (tmp_path / "run" / "units.jsonl").read_text().splitlines()
    assert [json.loads(unit)["unit"] for unit in units] == ["k=1/streams=1"]


def test_a_killed_sweep_measures_only_the_points_that_are_missing(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    streams, run = tmp_path / "streams", tmp_path / "run"
    fake(streams=str(streams))
    config = SweepConfig(streams=(1, 2), ks=(0, 1), max_tokens=4, requests_per_stream=2)
    first = sweep(Servers(grafted, tmp_path / "vllm.log"), config, run)
    units = (run / "units.jsonl").read_bytes().splitlines(keepends=True)
    (run / "units.jsonl").write_bytes(b"".join(units[:3]) + units[3][:-9])
    servers = Servers(grafted, tmp_path / "vllm.log")
    streams.unlink()
    again = sweep(servers, config, run)
    assert servers.started == [1]
    assert again["points"][:3] == first["points"][:3]
    assert again["points"][3]["concurrency"] == 2
    assert len(streams.read_text().split()) >= 2 + 2 * 2

    def no_server(_k: int | None) -> Any:
        raise AssertionError("a server was asked for")

    assert sweep(no_server, config, run) == again


def test_points_of_earlier_calls_stay_in_the_result(tmp_path: Path) -> None:
    def measured(*streams: int, k: int | None = None) -> list[tuple[int | None, int]]:
        config = SweepConfig(streams, (k,), max_tokens=4, requests_per_stream=1)
        result = sweep(lambda _k: running(Steady()), config, tmp_path)
        assert [best["concurrency"] for best in result["best_k"]] == []
        return [(point["k"], point["concurrency"]) for point in result["points"]]

    assert measured(1, 3) == [(None, 1), (None, 3)]
    assert measured(2) == [(None, 1), (None, 2), (None, 3)]
    # As it is, the server may draft as many: those two are not compared.
    assert measured(2, k=1) == [(None, 1), (None, 2), (None, 3), (1, 2)]


def point(k: int, concurrency: int, speed: float, half: float = 1.0) -> dict[str, Any]:
    return {
        "k": k,
        "concurrency": concurrency,
        "aggregate_tok_s": speed,
        "aggregate_interval": [speed - half, speed + half],
        "per_stream_tok_s": speed / concurrency,
        "per_stream_spread": [speed / concurrency - 0.2, speed / concurrency + 0.2],
    }


def test_the_best_k_of_each_load_is_clear_only_if_no_other_interval_reaches_it() -> None:
    points = [point(0, 1, 10), point(1, 1, 15), point(0, 2, 20), point(1, 2, 19)]
    assert [(b["concurrency"], b["k"], b["clear"]) for b in best_k(points)] == [
        (1, 1, True),
        (2, 0, False),
    ]
    assert best_k(points[:1]) == []


def test_a_drop_at_an_odd_number_of_streams_is_found_and_noise_is_not() -> None:
    points = [point(1, 1, 10), point(1, 2, 18), point(1, 3, 12), point(1, 4, 11.5)]
    assert [(d["concurrency"], d["smaller"]) for d in dips(points)] == [(3, 2)]


def test_the_chart_is_a_picture_and_the_same_for_the_same_points() -> None:
    points = [point(k, n, 10.0 * n**0.5 + k) for k in (0, 1, 2) for n in (1, 2, 3, 8)]
    chart = sweep_chart(points)
    assert chart.startswith(b"\x89PNG")
    assert chart == sweep_chart(points)
    assert sweep_chart([{**p, "k": None} for p in points[:4]]) != chart
