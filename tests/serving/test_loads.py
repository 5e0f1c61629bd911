"""Loads on a stand-in server: several requests at a time, and the workload's fifteen."""

import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mtp_graft.bench import sweep
from mtp_graft.bench.decode import DecodeConfig
from mtp_graft.bench.sweep import measure_sweep, run_load
from mtp_graft.bench.workload import load_workload, measure_workload
from mtp_graft.errors import GraftError
from mtp_graft.serving import command
from mtp_graft.serving.client import ServerClient

from .bench_server import PROMPTS, quiet, serving


@pytest.mark.vllm
def test_vllms_client_holds_load(fake: Any, grafted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(step_s=0.002, accepts=[2, 0], streams=str(Path("streams")), fails=[5])
    config = DecodeConfig(max_tokens=20, rounds=3)
    with serving(grafted, 2) as client:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the engine's client
        served = nullcontext(client)
        found = measure_sweep(lambda _k: served, (PROMPTS, config), [2], [3], quiet, Path("run"))
    [point] = found["points"]
    # Of nine requests; warm-ups are not counted, and one fails.
    assert (point["requests"], point["errors"], point["tokens"]) == (8, 1, 8 * 20)
    assert point["failures"] == ["Internal Server Error"]
    # 20 tokens: one from prefill, then 3, 1, ..., 3: 9 steps of which 5 accept both drafts.
    assert point["accepted_by_position"] == [8 * 5, 8 * 5]
    assert point["acceptance_by_position"] == pytest.approx([5 / 9, 1.0])
    assert point["per_stream_tok_s"] < point["aggregate_tok_s"] < 3 * 19 / 9 / 0.002
    assert point["ttft_ms"] >= 2
    asked = {int(line) for line in Path("streams").read_text().split()}
    assert asked == {sum(b"ab"), sum(b"hello")}, "the prompts are the server's own tokens"


FOUND = {
    "errors": ["", "Traceback\n  File x\nOSError: gone\n"],
    **{"output_lens": [11, 0], "ttfts": [0.5, 0.0], "latencies": [2.5, 0.0]},
    **{"output_throughput": 4.0, "total_output_tokens": 11, "duration": 2.75},
}


@pytest.fixture
def client(vllm: object, monkeypatch: pytest.MonkeyPatch) -> Mock:
    client = Mock(return_value=FOUND)
    monkeypatch.setattr(sweep, "run_load", client)
    monkeypatch.setattr(ServerClient, "encode", lambda _self, prompt: list(prompt.content.encode()))
    return client


def measure(folder: Path, k: int) -> Any:
    server = nullcontext(ServerClient("http://127.0.0.1:9", "key"))
    config = DecodeConfig(max_tokens=11, rounds=1, temperature=0.5)
    return measure_sweep(lambda _k: server, (PROMPTS, config), [k], [2], quiet, folder)["points"]


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
    client.return_value = FOUND | {"errors": ["refused", "refused"]}
    with pytest.raises(GraftError, match=r"concurrency 2: every request failed.*refused"):
        measure(tmp_path, 1)


def test_needs_vllms_client(vllm: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GraftError, match=r"vllm bench serve failed against http://127\.0\.0\.1:9"):
        run_load("http://127.0.0.1:9", {})
    monkeypatch.setattr(command, "installed_vllm", lambda: None)
    with pytest.raises(GraftError, match=r"vLLM is not installed .* pip install"):
        measure(tmp_path, 1)


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


def test_every_request_is_timed(fake: Any, grafted: Path, tmp_path: Path) -> None:
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


def test_a_workload_asks_all_once(fake: Callable[..., None], grafted: Path, tmp_path: Path) -> None:
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
