"""The fifteen requests of the workload, against a stand-in server."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench.workload import (
    CATEGORIES,
    Workload,
    WorkloadConfig,
    load_workload,
    measure_workload,
)
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ServerClient

from .bench_server import quiet, serving

WORKLOAD = load_workload()
THREE = Workload(WORKLOAD.system, WORKLOAD.tools, (*WORKLOAD.tasks[:2], WORKLOAD.tasks[6]))


def test_there_are_three_requests_of_each_category_and_retrieval_has_documents() -> None:
    counts = Counter(task.category for task in WORKLOAD.tasks)
    assert counts == dict.fromkeys(CATEGORIES, 3)
    assert len({task.id for task in WORKLOAD.tasks}) == 15
    assert len({task.text for task in WORKLOAD.tasks}) == 15
    assert WORKLOAD.system and len(WORKLOAD.tools) == 3
    for task in WORKLOAD.tasks:
        is_long = len(task.text.split()) > 500
        assert is_long == (task.category == "retrieval"), task.id
        if is_long:
            assert task.text.split("\n\n")[-1].startswith("From the")


def test_every_request_is_timed_and_summed_up_by_category(
    fake: Callable[..., None], grafted: Path
) -> None:
    fake()
    with serving(grafted) as client:
        result = measure_workload(lambda: client, THREE, WorkloadConfig(), quiet)
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
    result = measure_workload(lambda: client, THREE, WorkloadConfig(thinking=True), quiet)
    warm_up, *asked = bodies
    assert warm_up["max_tokens"] == 8
    for body, task in zip(asked, THREE.tasks, strict=True):
        assert "max_tokens" not in body
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert body["messages"][1]["content"] == task.text
        assert body["chat_template_kwargs"] == {"thinking": True}
        assert (len(body["tools"]), body["temperature"]) == (3, 0.0)
    assert result["acceptance"] is None


def test_a_workload_that_was_cut_off_asks_nothing_twice(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake(fails={"3": "500"}, streams=str(tmp_path / "streams"))

    def measure(connect: Callable[[], ServerClient]) -> dict[str, Any]:
        return measure_workload(connect, THREE, WorkloadConfig(), quiet, tmp_path / "run")

    with serving(grafted) as client:
        with pytest.raises(GraftError, match="out of luck"):
            measure(lambda: client)
        result = measure(lambda: client)
    first, second, third = (sum((THREE.system + t.text).encode()) for t in THREE.tasks)
    # Warm-up and both of the first call, then warm-up and what was missing.
    asked = [int(line) for line in (tmp_path / "streams").read_text().split()]
    assert asked == [first, first, second, first, second, third]

    def no_server() -> ServerClient:
        raise AssertionError("a server was asked for")

    assert measure(no_server) == result
