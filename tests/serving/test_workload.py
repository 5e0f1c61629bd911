"""The fifteen requests of the workload, against a stand-in server."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench.workload import CATEGORIES, load_workload, measure_workload
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ServerClient

from .bench_server import quiet, serving

WORKLOAD = load_workload()
THREE = [*WORKLOAD[:2], WORKLOAD[6]]


def said(number: int) -> bytes:
    """Return a request's messages, of which the stand-in makes tokens."""
    return "".join(message["content"] for message in THREE[number].body["messages"]).encode()


def test_there_are_three_requests_of_each_category_and_retrieval_has_documents() -> None:
    counts = Counter(request.category for request in WORKLOAD)
    assert counts == dict.fromkeys(CATEGORIES, 3)
    questions = {request.id: request.body["messages"][1]["content"] for request in WORKLOAD}
    assert len(questions) == len(set(questions.values())) == 15
    for request in WORKLOAD:
        is_long = len(questions[request.id].split()) > 500
        assert is_long == (request.category == "retrieval"), request.id
        if is_long:
            assert questions[request.id].split("\n\n")[-1].startswith("From the")


def test_every_request_is_timed_and_summed_up_by_category(
    fake: Callable[..., None], grafted: Path
) -> None:
    fake()
    with serving(grafted) as client:
        result = measure_workload(lambda: client, THREE, quiet)
    assert [task["id"] for task in result["tasks"]] == [request.id for request in THREE]
    # 24 tokens: one from prefill, then 2, 1, 2, 1, ...: 15 steps, 8 of which accept.
    for number, task in enumerate(result["tasks"]):
        assert task["completion_tokens"] == 24
        assert (task["drafted"], task["accepted"]) == (15, 8)
        assert task["prompt_tokens"] == len(said(number))
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
    requests = load_workload(thinking=True)
    result = measure_workload(lambda: client, requests, quiet)
    warm_up, *asked = bodies
    assert warm_up["max_tokens"] == 8
    assert [body["messages"] for body in asked] == [r.body["messages"] for r in requests]
    for body in asked:
        assert "max_tokens" not in body
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert body["chat_template_kwargs"] == {"thinking": True}
        assert (len(body["tools"]), body["temperature"]) == (3, 0.0)
    assert result["acceptance"] is None


def test_a_workload_that_was_cut_off_asks_nothing_twice(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake(fails={"3": "500"}, streams=str(tmp_path / "streams"))

    def measure(connect: Callable[[], ServerClient]) -> dict[str, Any]:
        return measure_workload(connect, THREE, quiet, tmp_path / "run")

    with serving(grafted) as client:
        with pytest.raises(GraftError, match="out of luck"):
            measure(lambda: client)
        result = measure(lambda: client)
    first, second, third = (sum(said(number)) for number in range(3))
    # Warm-up and both of the first call, then warm-up and what was missing.
    asked = [int(line) for line in (tmp_path / "streams").read_text().split()]
    assert asked == [first, first, second, first, second, third]

    def no_server() -> ServerClient:
        raise AssertionError("a server was asked for")

    assert measure(no_server) == result
