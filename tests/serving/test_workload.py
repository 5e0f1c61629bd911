"""The fifteen requests of the workload, against a stand-in server."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench.workload import load_workload, measure_workload
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ServerClient

from .bench_server import quiet, serving

WORKLOAD = load_workload()
THREE = [*WORKLOAD[:2], WORKLOAD[6]]
#: The requests' messages, of which the stand-in makes tokens.
SAID = ["".join(m["content"] for m in request.body["messages"]).encode() for request in THREE]


def test_there_are_three_requests_of_each_category_and_retrieval_has_documents() -> None:
    assert [*Counter(request.category for request in WORKLOAD).values()] == [3] * 5
    asked = {request.id: request.body["messages"][1]["content"] for request in WORKLOAD}
    assert len(asked) == 15
    retrieval = {request.id for request in WORKLOAD if request.category == "retrieval"}
    assert {name for name, text in asked.items() if len(text.split()) > 500} == retrieval


def test_every_request_is_timed_and_summed_up_by_category(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake()
    with serving(grafted) as client:
        result = measure_workload(lambda: client, THREE, quiet, tmp_path / "run")
    assert [task["id"] for task in result["tasks"]] == [request.id for request in THREE]
    # 24 tokens: one from prefill, then 2, 1, 2, 1, ...: 15 steps, 8 of which accept.
    for said, task in zip(SAID, result["tasks"], strict=True):
        assert task["completion_tokens"] == 24
        assert (task["drafted"], task["accepted"]) == (15, 8)
        assert task["prompt_tokens"] == len(said)
        assert task["finish_reason"] == "length"
    counts = {name: found["requests"] for name, found in result["categories"].items()}
    assert counts == {"chat": 2, "retrieval": 1}
    assert result["acceptance"] == pytest.approx(8 / 15)
    assert result["cut_off"] == 3
    speeds = [task["decode_tok_s"] for task in result["tasks"]]
    assert result["decode_tok_s"] == pytest.approx(sum(speeds) / 3)


def test_system_tools_and_thinking_are_sent_and_no_cap_unless_asked_for() -> None:
    for request in load_workload(thinking=True):
        assert "max_tokens" not in request.body
        roles = [message["role"] for message in request.body["messages"]]
        assert roles == ["system", "user"] and len(request.body["tools"]) == 3
        assert request.body["chat_template_kwargs"] == {"thinking": True}
        assert request.body["temperature"] == 0.0
    assert load_workload(max_tokens=9)[0].body["max_tokens"] == 9


def test_a_workload_that_was_cut_off_asks_nothing_twice(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake(fails=[3], streams=str(tmp_path / "streams"))

    def measure(connect: Callable[[], ServerClient]) -> dict[str, Any]:
        return measure_workload(connect, THREE, quiet, tmp_path / "run")

    with serving(grafted) as client:
        with pytest.raises(GraftError, match="out of luck"):
            measure(lambda: client)
        result = measure(lambda: client)
    first, second, third = map(sum, SAID)
    # Warm-up and both of the first call, then warm-up and what was missing.
    asked = [int(line) for line in (tmp_path / "streams").read_text().split()]
    assert asked == [first, first, second, first, second, third]

    assert measure(lambda: pytest.fail("a server was asked for")) == result
