"""The fifteen requests of the workload, against a stand-in server."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench.decode import Report
from mtp_graft.bench.requests import Session
from mtp_graft.bench.workload import (
    CATEGORIES,
    Workload,
    WorkloadConfig,
    load_workload,
    measure_workload,
)
from mtp_graft.errors import GraftError
from mtp_graft.serving import server
from mtp_graft.serving.client import ServerClient

from .bench_server import quiet, serving

WORKLOAD = load_workload()
THREE = Workload(WORKLOAD.system, WORKLOAD.tools, (*WORKLOAD.tasks[:2], WORKLOAD.tasks[6]))


@pytest.fixture
def client(
    vllm: Path, grafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> Iterator[ServerClient]:
    """A client of a server with a head, which behaves as `settings` says."""
    monkeypatch.setattr(server, "POLL_S", 0.02)
    with serving(grafted, tmp_path / "vllm.log") as client:
        yield client


@pytest.fixture
def settings(request: pytest.FixtureRequest, fake: Callable[..., None], tmp_path: Path) -> None:
    fake(**getattr(request, "param", {}), streams=str(tmp_path / "streams"))


def measure(
    client: ServerClient, session: Session | None = None, report: Report = quiet
) -> dict[str, Any]:
    session = session or Session(attempts=2, wait_s=0.0)
    return measure_workload(lambda: client, THREE, WorkloadConfig(), report, session)


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


def test_every_request_is_timed_and_summed_up_by_category(client: ServerClient) -> None:
    result = measure(client)
    assert [task["id"] for task in result["tasks"]] == [task.id for task in THREE.tasks]
    # 24 tokens: one from prefill, then 2, 1, 2, 1, ...: 15 steps, 8 of which accept.
    for number, task in enumerate(result["tasks"]):
        assert (task["completion_tokens"], task["decoded_tokens"]) == (24, 23)
        assert (task["drafted"], task["accepted"]) == (15, 8)
        assert task["prompt_tokens"] == len((THREE.system + THREE.tasks[number].text).encode())
        assert task["finish_reason"] == "length"
    assert list(result["categories"]) == ["chat", "retrieval"]
    assert result["categories"]["chat"]["requests"] == 2
    assert result["acceptance"] == pytest.approx(8 / 15)
    assert result["cut_off"] == 3
    speeds = [task["decode_tok_s"] for task in result["tasks"]]
    assert result["decode_tok_s"] == pytest.approx(sum(speeds) / 3)
    assert result["errors"] == 0


def test_there_is_no_cap_on_tokens_but_system_tools_and_thinking_are_sent() -> None:
    bodies: list[dict[str, Any]] = []

    class Listening(ServerClient):
        def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
            bodies.append(body)
            yield {"choices": [{"token_ids": [1], "delta": {}, "finish_reason": None}]}
            last = {"token_ids": [2, 3], "delta": {}, "finish_reason": "tool_calls"}
            yield {"choices": [last]}
            yield {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}

        def spec_decode_counters(self) -> None:
            return None

    client = Listening("http://127.0.0.1:9")
    thinking = WorkloadConfig(thinking=True)
    result = measure_workload(lambda: client, THREE, thinking, quiet, Session())
    warm_up, *asked = bodies
    assert warm_up["max_tokens"] == 8
    for body, task in zip(asked, THREE.tasks, strict=True):
        assert "max_tokens" not in body
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert body["messages"][1]["content"] == task.text
        assert body["chat_template_kwargs"] == {"thinking": True}
        assert (len(body["tools"]), body["temperature"]) == (3, 0.0)
    assert result["acceptance"] is None


@pytest.mark.parametrize("settings", [{"fails": {"3": "closes"}}], indirect=True)
def test_a_failed_request_is_counted_and_asked_again(client: ServerClient) -> None:
    result = measure(client)  # the warm-up is the first
    [failed] = result["failures"]
    assert (failed["request"], failed["kind"]) == (THREE.tasks[1].id, "broken")
    assert [task["completion_tokens"] for task in result["tasks"]] == [24, 24, 24]
    assert [task["drafted"] for task in result["tasks"]] == [15, 15, 15]


@pytest.mark.parametrize("settings", [{"fails": {"3": "500"}}], indirect=True)
def test_a_workload_that_was_cut_off_asks_nothing_twice(
    client: ServerClient, tmp_path: Path
) -> None:
    session = Session(attempts=1)
    seen: list[tuple[int, int]] = []

    def report(_label: str, done: int, total: int) -> None:
        seen.append((done, total))

    with pytest.raises(GraftError, match=THREE.tasks[1].id):
        measure(client, session, report)
    result = measure(client, session, report)
    first, second, third = (sum((THREE.system + t.text).encode()) for t in THREE.tasks)
    # Warm-up and both of the first call, then warm-up and what was missing.
    asked = [int(line) for line in (tmp_path / "streams").read_text().split()]
    assert asked == [first, first, second, second, second, third]
    assert [task["id"] for task in result["tasks"]] == [task.id for task in THREE.tasks]
    assert seen == [(0, 0), (0, 3), (1, 3), (0, 0), (1, 3), (2, 3), (3, 3)]

    def no_server() -> ServerClient:
        raise AssertionError("a server was asked for")

    assert measure_workload(no_server, THREE, WorkloadConfig(), quiet, session) == result
