"""Decode speed, drafts and greedy texts, on a stand-in server whose steps are known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench import requests
from mtp_graft.bench.decode import (
    DecodeConfig,
    compare,
    decode_result,
    find_divergences,
    measure_base,
    measure_mtp,
    measure_rounds,
    median_round,
)
from mtp_graft.bench.requests import BrokenAnswer, Session, open_session, time_answer
from mtp_graft.errors import GraftError
from mtp_graft.serving import server
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.metrics import SpecDecodeCounters, drafting_result, parse_spec_decode

from .bench_server import PROMPTS, quiet, serving

CONFIG = DecodeConfig(max_tokens=20, rounds=2)
TOKENS = {"a": (1, 2), "b": (3,)}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL_S", 0.05)


class Ticking:
    """The clock of the client: a step has passed whenever it is looked at, once a chunk."""

    STEP_S = 0.02

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        self.now_s += self.STEP_S
        return self.now_s


def measured(tmp_path: Path, base: Path, grafted: Path) -> dict[str, Any]:
    with serving(base, tmp_path / "base.log") as client:
        without = json.loads(json.dumps(measure_base(client, PROMPTS, CONFIG, quiet)))
    with serving(grafted, tmp_path / "mtp.log") as client:
        return compare(without, measure_mtp(client, without, CONFIG, quiet))


def test_a_faster_identical_server_is_seen_as_that(
    fake: Callable[..., None],
    base: Path,
    grafted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake()
    monkeypatch.setattr(requests, "time", Ticking())
    result = measured(tmp_path, base, grafted)
    assert result["greedy_identical"] is True and result["divergences"] == []
    # 20 tokens: one from prefill, then 2, 1, 2, 1, ...: 13 steps, 7 of which accept. The events
    # with the reason and the counts come after the last chunk.
    assert result["acceptance"] == pytest.approx(7 / 13)
    assert result["base"]["acceptance"] is result["base"]["k"] is None
    assert (result["mtp"]["k"], result["mtp"]["steps"]) == (1, 26)
    assert result["mtp"]["acceptance_length"] == pytest.approx(20 / 13)
    assert result["decode_tok_s"]["base"] == pytest.approx(1 / Ticking.STEP_S)
    assert result["decode_tok_s"]["mtp"] == pytest.approx(19 / 13 / Ticking.STEP_S)
    assert result["base"]["repeatable"] and result["mtp"]["repeatable"]


def test_divergences_name_prompt_position_and_the_bases_margin(
    fake: Callable[..., None], base: Path, grafted: Path, tmp_path: Path
) -> None:
    fake(diverge_at=4)
    result = measured(tmp_path, base, grafted)
    assert result["greedy_identical"] is False
    # The stand-in's margin at position i is 0.25 + i.
    found = [(d["prompt"], d["position"], d["margin"]) for d in result["divergences"]]
    assert found == [("a", 4, pytest.approx(4.25)), ("b", 4, pytest.approx(4.25))]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [((1, 2, 3), []), ((1, 9, 3), [(1, 0.2)]), ((1, 2), [(2, 0.3)]), ((1, 2, 3, 4), [(3, None)])],
)
def test_the_first_difference_is_found(tokens: tuple[int, ...], expected: list[Any]) -> None:
    reference = {"p": {"token_ids": [1, 2, 3], "margins": [0.1, 0.2, 0.3]}}
    found = find_divergences(reference, [tokens])
    assert [(d["position"], d["margin"]) for d in found] == expected


def test_each_draft_position_is_counted_given_that_those_before_were_accepted(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake(accepts=[3, 1, 0])
    with serving(grafted, tmp_path / "vllm.log", k=3) as client:
        result = decode_result(measure_rounds(client, TOKENS, CONFIG, quiet), CONFIG)
    # 20 tokens: one from prefill, then 4, 2, 1, 4, 2, 1, 4, and 1 of a last 2.
    assert result["k"] == 3
    assert result["accepted_by_position"] == [2 * n for n in (6, 3, 3)]
    assert result["acceptance_by_position"] == [6 / 8, 3 / 6, 3 / 3]
    assert result["acceptance_length"] == 1 + 12 / 8
    assert result["acceptance"]["median"] == 12 / 24


def test_a_position_that_no_step_reached_has_no_acceptance() -> None:
    counters = SpecDecodeCounters(10, 30, 0, (0, 0, 0))
    found = drafting_result(counters)
    assert found["acceptance_by_position"] == [0.0, None, None]
    assert found["acceptance_by_position_interval"][1:] == [None, None]
    assert found["acceptance_length"] == 1.0
    nothing = drafting_result(counters - counters)
    assert nothing["k"] == 3 and nothing["acceptance_by_position"] == [None] * 3
    assert set(drafting_result(None).values()) == {None}


def test_counters_are_summed_over_engines_and_split_by_position() -> None:
    page = "\n".join(
        f'vllm:spec_decode_num_{name}_total{{engine="{engine}",model_name="m"{label}}} {value}'
        for engine in (0, 1)
        for name, label, value in [
            ("drafts", "", 10.0),
            ("draft_tokens", "", 2e1),
            ("accepted_tokens", "", 12.0),
            ("accepted_tokens_per_pos", ',position="1"', 4.0),
            ("accepted_tokens_per_pos", ',position="0"', 8.0),
        ]
    )
    assert parse_spec_decode(page + "\n") == SpecDecodeCounters(20, 40, 24, (16, 8))
    assert parse_spec_decode("vllm:num_requests_running 0.0\n") is None
    with pytest.raises(GraftError, match="not vLLM's metrics"):
        parse_spec_decode("<html>\n")


def answer(tokens: int, first: int, ttft_s: float, decode_s: float) -> requests.Answer:
    chunks = [[ttft_s, first], *([[ttft_s + decode_s, tokens - first]] if tokens > first else ())]
    return {"token_ids": list(range(tokens)), "chunks": chunks, "counters": None}


def test_speed_counts_tokens_after_the_first_chunk_over_all_prompts() -> None:
    in_one_chunk = answer(1, 1, 0.3, 0.0)  # has no time per token
    one = [answer(11, 1, 0.1, 1.0), answer(32, 2, 0.3, 4.0), in_one_chunk]
    result = decode_result([one], CONFIG)
    assert result["decode_tok_s"]["median"] == pytest.approx((10 + 30) / 5.0)
    assert result["ttft_ms"]["median"] == pytest.approx(300.0)
    assert result["tpot_ms"]["median"] == pytest.approx((100.0 + 4000.0 / 30) / 2)
    with pytest.raises(GraftError, match="single chunk"):
        decode_result([one, [in_one_chunk] * 3], CONFIG)


def test_results_are_spread_over_rounds_and_the_one_of_median_speed_is_kept() -> None:
    rounds = [[answer(11, 1, 0.1, 10 / speed)] for speed in (20.0, 10.0, 40.0)]
    speed = decode_result(rounds, CONFIG)["decode_tok_s"]
    spread = [speed[key] for key in ("median", "min", "max", "runs")]
    assert spread == [pytest.approx(20.0), pytest.approx(10.0), pytest.approx(40.0), 3]
    kept = median_round(rounds)
    assert (kept["round"], kept["rounds"], kept["timed"]) == (1, 3, rounds[0])
    assert median_round(rounds[:2])["round"] == 2
    assert decode_result([*rounds, [answer(6, 1, 0.1, 1.0)]], CONFIG)["repeatable"] is False


def test_chunks_come_with_their_texts(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake()
    with serving(grafted, tmp_path / "vllm.log") as client:
        body = {"prompt": [1, 2], "max_tokens": 5, "ignore_eos": True}
        found = time_answer(client, "/v1/completions", body)
    assert [size for _, size in found["chunks"]] == [1, 2, 1, 1]
    assert found["texts"] == [" 3", " 10 17", " 24", " 31"]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [("500", "refused"), ("hangs", "timeout"), ("closes", "broken"), ("aborts", "broken")],
)
def test_a_failed_request_is_counted_and_asked_again(
    fake: Callable[..., None], grafted: Path, tmp_path: Path, failure: str, kind: str
) -> None:
    fake(fails={"3": failure}, step_s=0.001)  # the warm-up is stream 1, "a" 2, "b" 3
    session = Session(wait_s=0.0)
    with serving(grafted, tmp_path / "vllm.log", silence_s=0.5) as client:
        rounds = measure_rounds(client, TOKENS, CONFIG, quiet, session=session)
    found = session.as_result()
    assert found["errors"] == 1
    [failed] = found["failures"]
    assert (failed["request"], failed["attempt"], failed["kind"]) == ("decode/0/b", 1, kind)
    # What the broken attempt drafted is in no round.
    counted = [[one["counters"] for one in answers] for answers in rounds]
    assert counted[0] == counted[1]
    assert decode_result(rounds, CONFIG)["repeatable"] is True


def test_a_request_that_always_fails_ends_the_measurement(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake(fails={"2": "500", "3": "closes"})
    with (
        serving(grafted, tmp_path / "vllm.log") as client,
        pytest.raises(GraftError, match=r"decode/0/a: failed 2 times, .* ended after 1"),
    ):
        measure_rounds(client, TOKENS, CONFIG, quiet, session=Session(attempts=2, wait_s=0.0))


def chunk(**content: Any) -> dict[str, Any]:
    return {"choices": [{"token_ids": [7], "finish_reason": "stop", **content}]}


LAST = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


class Answering(ServerClient):
    """A client whose server sends these events, and says what it drafted nothing."""

    def __init__(self, *sent: Any) -> None:
        super().__init__("http://127.0.0.1:9")
        self.sent = sent

    def events(self, path: str, body: dict[str, Any]) -> Any:
        yield from self.sent

    def spec_decode_counters(self) -> None:
        return None


def test_a_chats_stream_may_say_null_where_there_is_no_text() -> None:
    found = time_answer(Answering(chunk(delta={"content": None}), LAST), "/v1/x", {})
    assert (found["texts"], found["token_ids"], found["prompt_tokens"]) == ([""], [7], 1)


@pytest.mark.parametrize(
    "sent",
    [
        ({"choices": ["x"]}, LAST),
        (chunk(delta=None), LAST),
        (chunk(delta={"content": ["x"]}), LAST),
        (chunk(delta={}, finish_reason=["stop"]), LAST),
        (chunk(delta={}, finish_reason="abort"), LAST),
        (chunk(delta={}), {"choices": [], "usage": 1}),
        (chunk(delta={}), {"choices": [], "usage": {"completion_tokens": 1}}),
        (chunk(delta={}),),
        (chunk(text="x", token_ids=[7, 8]), LAST),
        (5,),
    ],
)
def test_a_stream_that_is_not_whole_is_a_broken_answer(sent: tuple[Any, ...]) -> None:
    with pytest.raises(BrokenAnswer):
        time_answer(Answering(*sent), "/v1/x", {})


def test_a_run_folder_keeps_what_was_measured_and_belongs_to_one_claim(tmp_path: Path) -> None:
    def fail() -> int:
        raise GraftError("out of luck")

    session = open_session(tmp_path, {"k": 1}, attempts=1)
    assert session.measure("a", lambda: [1]) == [1]
    with pytest.raises(GraftError, match="b: failed 1 times"):
        session.measure("b", fail)
    session.keep("c", 3)
    again = open_session(tmp_path, {"k": 1})
    assert again.measure("a", fail) == [1] and again.units["c"] == 3
    assert again.as_result()["errors"] == 1, "failures are kept, too"
    with pytest.raises(GraftError, match="begun with k = 1, now it is 2"):
        open_session(tmp_path, {"k": 2})
