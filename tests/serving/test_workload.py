"""The fifteen requests of the workload, against a stand-in server."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench.decode import Report
from mtp_graft.bench.ledger import open_ledger
from mtp_graft.bench.streams import BenchClient, Retrying
from mtp_graft.bench.workload import (
    CATEGORIES,
    Workload,
    WorkloadConfig,
    load_workload,
    measure_workload,
)
from mtp_graft.errors import GraftError
from mtp_graft.serving import server
from mtp_graft.serving.command import ServeOptions

WORKLOAD = load_workload()
THREE = Workload(WORKLOAD.system, WORKLOAD.tools, (*WORKLOAD.tasks[:2], WORKLOAD.tasks[6]))


def quiet(_label: str, _done: int, _total: int) -> None:
    pass


Connect = Callable[[], BenchClient]


@pytest.fixture
def connect(
    vllm: Path, grafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Connect]:
    """Return a function that serves a checkpoint with a head until the test ends."""
    monkeypatch.setattr(server, "POLL_S", 0.02)
    with ExitStack() as stack:

        def start() -> BenchClient:
            options = ServeOptions(grafted, port=0)
            running = stack.enter_context(server.managed_server(options, tmp_path / "vllm.log"))
            return stack.enter_context(BenchClient(running.base_url, silence_s=0.5))

        yield start


def measure(
    connect: Connect,
    workload: Workload = THREE,
    config: WorkloadConfig | None = None,
    run: Path | None = None,
    attempts: int = 2,
    report: Report = quiet,
) -> dict[str, Any]:
    retrying = Retrying(attempts, wait_s=0.0)
    with open_ledger(run, {}) as ledger:
        config = config or WorkloadConfig()
        return measure_workload(connect, workload, config, report, ledger, retrying)


def prompt_sum(workload: Workload, number: int) -> int:
    return sum((workload.system + workload.tasks[number].text).encode())


def test_there_are_three_requests_of_each_category_and_no_two_are_alike() -> None:
    counts = Counter(task.category for task in WORKLOAD.tasks)
    assert counts == dict.fromkeys(CATEGORIES, 3)
    assert len({task.id for task in WORKLOAD.tasks}) == 15
    assert len({task.text for task in WORKLOAD.tasks}) == 15
    assert WORKLOAD.system and len(WORKLOAD.tools) == 3


def test_a_retrieval_request_has_its_document_before_the_question() -> None:
    for task in WORKLOAD.tasks:
        is_long = len(task.text.split()) > 500
        assert is_long == (task.category == "retrieval"), task.id
        if is_long:
            assert task.text.split("\n\n")[-1].startswith("From the")


def test_every_request_is_timed_and_summed_up_by_category(connect: Connect) -> None:
    result = measure(connect)
    assert [task["id"] for task in result["tasks"]] == [task.id for task in THREE.tasks]
    # 24 tokens: one from prefill, then 2, 1, 2, 1, ...: 15 steps, 8 of which accept.
    for number, task in enumerate(result["tasks"]):
        assert task["completion_tokens"] == 24
        assert (task["drafted"], task["accepted"]) == (15, 8)
        text = THREE.system + THREE.tasks[number].text
        assert task["prompt_tokens"] == len(text.encode())
        assert task["finish_reason"] == "length"
        assert task["content_chars"] == 24
    assert list(result["categories"]) == ["chat", "retrieval"]
    assert result["categories"]["chat"]["requests"] == 2
    assert result["acceptance"] == pytest.approx(8 / 15)
    assert result["cut_off"] == 3
    speeds = [task["decode_tok_s"] for task in result["tasks"]]
    assert result["decode_tok_s"] == pytest.approx(sum(speeds) / 3)
    assert result["errors"] == 0


def test_progress_counts_the_requests_that_are_done_those_of_earlier_sessions_too(
    fake: Callable[..., None], connect: Connect, tmp_path: Path
) -> None:
    fake(fails={"3": "500"})
    seen: list[tuple[int, int]] = []

    def report(_label: str, done: int, total: int) -> None:
        seen.append((done, total))

    client = connect()
    with pytest.raises(GraftError):
        measure(lambda: client, run=tmp_path / "run", attempts=1, report=report)
    assert seen == [(0, 0), (0, 3), (1, 3)]
    seen.clear()
    measure(lambda: client, run=tmp_path / "run", attempts=1, report=report)
    assert seen == [(0, 0), (1, 3), (2, 3), (3, 3)]


def test_there_is_no_cap_on_tokens_but_system_tools_and_thinking_are_sent() -> None:
    bodies: list[dict[str, Any]] = []

    class Listening(BenchClient):
        def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
            bodies.append(body)
            yield {"choices": [{"token_ids": [1], "delta": {}, "finish_reason": None}]}
            yield {
                "choices": [
                    {
                        "token_ids": [2, 3],
                        "delta": {"tool_calls": [{"index": 0}], "reasoning": "so"},
                        "finish_reason": "tool_calls",
                    }
                ]
            }
            yield {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}

        def spec_decode_counters(self) -> None:
            return None

    client = Listening("http://127.0.0.1:9")
    result = measure(lambda: client, config=WorkloadConfig(thinking=True))
    warm_up, *asked = bodies
    assert warm_up["max_tokens"] == 8
    for body, task in zip(asked, THREE.tasks, strict=True):
        assert "max_tokens" not in body
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert body["messages"][1]["content"] == task.text
        assert body["chat_template_kwargs"] == {"thinking": True}
        assert len(body["tools"]) == 3
        assert body["temperature"] == 0.0
    first = result["tasks"][0]
    assert (first["tool_calls"], first["reasoning_chars"]) == (1, 2)
    assert (first["completion_tokens"], first["decoded_tokens"]) == (3, 2)
    assert result["acceptance"] is None


@pytest.mark.parametrize(
    ("failure", "kind"),
    [("500", "refused"), ("hangs", "timeout"), ("closes", "broken"), ("aborts", "broken")],
)
def test_a_failed_request_is_counted_and_asked_again(
    fake: Callable[..., None], connect: Connect, failure: str, kind: str
) -> None:
    fake(fails={"3": failure})  # the warm-up is the first
    result = measure(connect)
    assert result["errors"] == 1
    (found,) = result["failures"]
    assert (found["request"], found["attempt"], found["kind"]) == (THREE.tasks[1].id, 1, kind)
    assert [task["completion_tokens"] for task in result["tasks"]] == [24, 24, 24]
    assert [task["drafted"] for task in result["tasks"]] == [15, 15, 15]


def test_a_killed_workload_asks_nothing_twice(
    fake: Callable[..., None], connect: Connect, tmp_path: Path
) -> None:
    streams, run = tmp_path / "streams", tmp_path / "run"
    fake(streams=str(streams), fails={"3": "500"})
    client = connect()
    with pytest.raises(GraftError, match=THREE.tasks[1].id):
        measure(lambda: client, run=run, attempts=1)
    first, second, third = (prompt_sum(THREE, n) for n in range(3))
    result = measure(lambda: client, run=run, attempts=1)
    asked = [int(line) for line in streams.read_text().split()]
    # Warm-up and both of the first run, then warm-up and what was missing.
    assert asked == [first, first, second, second, second, third]
    assert [task["id"] for task in result["tasks"]] == [task.id for task in THREE.tasks]

    def no_server() -> BenchClient:
        raise AssertionError("a server was asked for")

    assert measure(no_server, run=run) == result


def test_another_configuration_does_not_go_on_in_the_same_folder(tmp_path: Path) -> None:
    with open_ledger(tmp_path, {"thinking": True}) as ledger:
        ledger.add("a", 1)
    with (
        pytest.raises(GraftError, match="begun with thinking = True, now it is False"),
        open_ledger(tmp_path, {"thinking": False}),
    ):
        pass


def test_two_benchmarks_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        open_ledger(tmp_path, {}),
        pytest.raises(GraftError, match="another benchmark writes"),
        open_ledger(tmp_path, {}),
    ):
        pass


def test_half_a_line_that_a_kill_left_is_dropped_and_a_broken_one_is_an_error(
    tmp_path: Path,
) -> None:
    with open_ledger(tmp_path, {}) as ledger:
        ledger.add("a", [1])
        ledger.add("b", 2)
    file = tmp_path / "units.jsonl"
    file.write_bytes(file.read_bytes()[:-4])
    with open_ledger(tmp_path, {}) as ledger:
        assert "a" in ledger and "b" not in ledger
        ledger.add("b", 3)
    with open_ledger(tmp_path, {}) as ledger:
        assert (ledger["a"], ledger["b"]) == ([1], 3)
    file.write_text("oops\n" + json.dumps({"unit": "c", "value": 1}) + "\n")
    with (
        pytest.raises(GraftError, match=r"units\.jsonl:1: not a measured unit"),
        open_ledger(tmp_path, {}),
    ):
        pass
