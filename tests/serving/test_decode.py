"""Decode speed, drafts and greedy texts, of one server and of two that take turns."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtp_graft.bench import decode
from mtp_graft.bench.decode import Answer, DecodeConfig, compare, decode_result, time_answer
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.metrics import SpecDecodeCounters, drafting_result, parse_spec_decode

from .bench_server import PROMPTS, quiet, serving

CONFIG = DecodeConfig(max_tokens=20, rounds=2)
STEP_S = 0.02
Fake = Callable[..., None]
Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(vllm: object, base: Path, grafted: Path, tmp_path: Path) -> Measure:
    """Return what compares both checkpoints; the result has the turns' names, too."""

    def call(pairs: int, config: DecodeConfig) -> dict[str, Any]:
        names: list[str] = []

        def serve(checkpoint: Path, name: str) -> AbstractContextManager[ServerClient]:
            names.append(name)
            return serving(checkpoint)

        servers = {"base": partial(serve, base), "mtp": partial(serve, grafted)}
        found = decode.measure_alternating(servers, (PROMPTS, config), pairs, quiet, tmp_path)
        return found | {"names": names}

    return call


def test_a_faster_server_is_seen_as_such(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    # A step has passed whenever the clock is looked at, once a chunk.
    clock = SimpleNamespace(perf_counter=partial(next, count(0.0, STEP_S)))
    monkeypatch.setattr(decode, "time", clock)
    result = measure(3, CONFIG)
    assert result["names"] == ["base-1", "mtp-1", "mtp-2", "base-2", "base-3", "mtp-3"]
    assert result["greedy_identical"] is True and result["divergences"] == []
    # 20 tokens: one from prefill, then 2, 1, 2, 1, ...: 13 steps, 7 of which accept. The events
    # with the reason and the counts come after the last chunk.
    assert result["acceptance"]["median"] == pytest.approx(7 / 13)
    assert result["against"]["acceptance"] is result["against"]["k"] is None
    assert (result["k"], result["steps"]) == (1, 26)
    assert result["acceptance_length"] == pytest.approx(20 / 13)
    assert result["against"]["decode_tok_s"]["median"] == pytest.approx(1 / STEP_S)
    assert result["decode_tok_s"]["median"] == pytest.approx(19 / 13 / STEP_S)
    assert result["decode_tok_s"]["runs"] == result["against"]["decode_tok_s"]["runs"] == 6
    ratio = result["ratio"]["decode_tok_s"]
    assert ratio["interval"] == pytest.approx([19 / 13, 19 / 13])
    assert (ratio["pairs"], ratio["prompts"], result["pairs"]) == (3, 2, 3)


def test_divergences_name_prompt_position_and_margin(fake: Fake, measure: Measure) -> None:
    fake(diverge_at=4)
    result = measure(1, DecodeConfig(20, rounds=1))
    assert result["greedy_identical"] is False
    assert result["ratio"] is None, "one pair has no interval"
    # The stand-in's margin at position i is 0.25 + i.
    found = [(d["prompt"], d["position"], d["margin"]) for d in result["divergences"]]
    assert found == [("a", 4, pytest.approx(4.25)), ("b", 4, pytest.approx(4.25))]


def test_sampled_texts_are_only_timed(fake: Fake, measure: Measure, tmp_path: Path) -> None:
    fake(requests=str(tmp_path / "requests"))
    result = measure(2, DecodeConfig(20, rounds=2, temperature=1.0))
    assert result["greedy_identical"] is result["divergences"] is None
    assert result["ratio"]["decode_tok_s"]["pairs"] == 2 and result["acceptance_length"] > 1
    first, second = json.loads((tmp_path / "mtp-1.json").read_text())["rounds"]
    assert first[0]["token_ids"] != second[0]["token_ids"], "the stand-in samples if told to"
    # Only the four that show that a server is up: no margins are asked for.
    assert len((tmp_path / "requests").read_text().split()) == 4


def turn(*rounds: list[Answer], reference: Any = None) -> dict[str, Any]:
    prompts = {f"p{n}": [1] for n in range(len(rounds[0]))}
    return {"prompts": prompts, "rounds": rounds, "reference": reference}


def answer(tokens: int, first: int, ttft_s: float, decode_s: float, said: Any = None) -> Answer:
    chunks = [[ttft_s, first], *([[ttft_s + decode_s, tokens - first]] if tokens > first else ())]
    return {"token_ids": said or list(range(tokens)), "chunks": chunks, "counters": None}


def test_the_ratio_is_that_of_the_speeds_whatever_drifts_meanwhile() -> None:
    """Prompts differ, and the machine slows down by 3 % from turn to turn."""
    turns: dict[str, list[Any]] = {"base": [], "mtp": []}
    for number, side in enumerate(["base", "mtp", "mtp", "base"] * 2):
        gain = (1.25 if side == "mtp" else 1.0) * 0.97**number
        turns[side].append(turn([answer(11, 1, 0.1, 10 / (gain * tok_s)) for tok_s in (10, 40)]))
    ratios = compare(turns["base"], turns["mtp"], DecodeConfig(11, rounds=1))["ratio"]
    ratio = ratios["decode_tok_s"]
    assert ratio["estimate"] == pytest.approx(1.25)
    # A pair whose second turn is MTP's has all of the drift against it, the next one for it.
    assert ratio["per_pair"] == pytest.approx([1.25 * 0.97, 1.25 / 0.97] * 2)
    assert ratio["interval"][0] < 1.25 < ratio["interval"][1]
    assert ratios["ttft_ms"]["interval"] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([1, 2, 3], []), ([1, 9, 3], [(1, 0.2)]), ([1, 2], [(2, 0.3)]), ([1, 2, 3, 4], [(3, None)])],
)
def test_the_first_difference_is_found(tokens: list[int], expected: list[Any]) -> None:
    reference = {"p0": {"token_ids": [1, 2, 3], "margins": [0.1, 0.2, 0.3]}}
    same, other = (answer(5, 1, 0.1, 1.0, said) for said in ([1, 2, 3], tokens))
    result = compare([turn([same], reference=reference)], [turn([other])], CONFIG)
    assert [(d["position"], d["margin"]) for d in result["divergences"]] == expected
    assert result["greedy_identical"] == (not expected)
    # A server whose text differs in its second round only.
    result = compare([turn([same], reference=reference)], [turn([same], [other])], CONFIG)
    assert (result["greedy_identical"], result["divergences"]) == (not expected, [])


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
    counts = [("drafts", "", 10.0), ("draft_tokens", "", 2e1), ("accepted_tokens", "", 12.0)]
    counts += [("accepted_tokens_per_pos", f',position="{n}"', 8.0 - 4 * n) for n in (1, 0)]
    page = "".join(
        f'vllm:spec_decode_num_{name}_total{{engine="{engine}"{label}}} {value}\n'
        for engine, (name, label, value) in product((0, 1), counts)
    )
    assert parse_spec_decode(page) == SpecDecodeCounters(20, 40, 24, (16, 8))
    assert parse_spec_decode("vllm:num_requests_running 0.0\n") is None
    with pytest.raises(GraftError, match="not vLLM's metrics"):
        parse_spec_decode("<html>\n")


def test_speed_counts_tokens_after_the_first_chunk_over_all_prompts() -> None:
    in_one_chunk = answer(1, 1, 0.3, 0.0)  # has no time per token
    one = [answer(11, 1, 0.1, 1.0), answer(32, 2, 0.3, 4.0), in_one_chunk]
    result = decode_result([turn(one)], CONFIG)
    assert result["decode_tok_s"]["median"] == pytest.approx((10 + 30) / 5.0)
    assert result["ttft_ms"]["median"] == pytest.approx(300.0)
    assert result["tpot_ms"]["median"] == pytest.approx((100.0 + 4000.0 / 30) / 2)
    with pytest.raises(GraftError, match="single chunk"):
        decode_result([turn(one, [in_one_chunk] * 3)], CONFIG)
    rounds = [[answer(11, 1, 0.1, 10 / speed)] for speed in (20.0, 10.0, 40.0)]
    speed = decode_result([turn(*rounds)], CONFIG)["decode_tok_s"]
    spread = [speed[key] for key in ("median", "min", "max", "runs")]
    assert spread == pytest.approx([20.0, 10.0, 40.0, 3])


def chunk(**content: Any) -> dict[str, Any]:
    return {"choices": [{"token_ids": [7], "finish_reason": "stop", **content}]}


def last(**usage: int) -> dict[str, Any]:
    return {"choices": [], "usage": usage}


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    def read(*events: Any) -> Answer:
        monkeypatch.setattr(ServerClient, "events", lambda *_: (each for each in events))
        return time_answer(ServerClient("http://127.0.0.1:9"), "/v1/x", {})

    monkeypatch.setattr(ServerClient, "spec_decode_counters", lambda _self: None)
    return read


ONE = last(prompt_tokens=1, completion_tokens=1)


def test_chunks_come_with_their_texts(stream: Callable[..., Answer]) -> None:
    more = {"choices": [{"token_ids": [], "finish_reason": None, "text": "b"}]}
    end = last(prompt_tokens=2, completion_tokens=3)
    found = stream(chunk(text="a"), more, chunk(text="c", token_ids=[8, 9]), end)
    assert ([size for _, size in found["chunks"]], found["texts"]) == ([1, 2], ["ab", "c"])
    found = stream(chunk(delta={"content": None}), ONE)
    assert (found["texts"], found["token_ids"], found["prompt_tokens"]) == ([""], [7], 1)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([chunk(text="x"), last(completion_tokens=1)], "not an answer of vLLM's"),
        ([chunk(text="x", finish_reason="abort"), ONE], "reason 'abort'"),
        ([chunk(text="x")], "ended after 1 tokens"),
        ([chunk(text="x", token_ids=[7, 8]), ONE], "ended after 2 tokens"),
    ],
)
def test_bad_streams_raise(events: list[Any], message: str, stream: Callable[..., Answer]) -> None:
    with pytest.raises(GraftError, match=message):
        stream(*events)
