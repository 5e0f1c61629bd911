"""Soaks of a stand-in server: a sound one, and one with each kind of fault planted."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mtp_graft.bench.soak import SoakConfig, draw, make_pool, soak
from mtp_graft.serving.client import ServerClient

from .bench_server import quiet
from .soak_server import BOS, Fault, Json, serving

Run = Callable[..., tuple[int, str, str]]


def soaked(
    fault: Fault | None = None, minutes: float = 0.01, silence_s: float = 5.0, always: bool = False
) -> Any:
    config = SoakConfig(minutes, concurrency=4, pool=16, silence_s=silence_s)
    with serving(fault, always=always) as url, ServerClient(url) as client:
        return soak(client, client, config, quiet)


def test_the_mix_has_all_kinds_and_a_seed_gives_it_again() -> None:
    pool = make_pool(3, 16, longest=2000, chars_per_token=4.0)
    assert pool == make_pool(3, 16, 2000, 4.0) != make_pool(4, 16, 2000, 4.0)
    sizes = [len(str(request.body["messages"])) for request in pool]
    assert min(sizes) < 50 and 2400 < max(sizes) < 9000
    assert 0 < sum("stream" in request.body for request in pool) < 16
    asked = [draw(random, pool) for random in [Random(5)] for _ in range(500)]
    assert asked == [draw(random, pool) for random in [Random(5)] for _ in range(500)]
    for kind in ("tools", "tool_choice", "response_format", "stop", "cache_salt", "seed"):
        assert 20 < sum(kind in request.body for request in asked) < 480
    assert any(request.hang_up_after for request in asked)


def test_a_sound_server_has_no_fault(measured: dict[str, Any]) -> None:
    result = soaked(minutes=0.04)
    measured |= {key: result[key] for key in ("requests", "equal", "sound", "hung_up")}
    assert result["corrupted"] == result["failures"] == [] and result["alone"] == {}
    assert result["near_ties"] == result["errors"] == result["hangs"] == 0
    counts = [result[key] for key in ("equal", "sound", "hung_up")]
    assert min(counts) > 0 and sum(counts) == result["requests"] > 100
    assert result["acceptance"] == {"alone": pytest.approx(2 / 3), "load": pytest.approx(2 / 3)}
    rates = [point["acceptance"] for point in result["over_time"]]
    assert rates == [pytest.approx(2 / 3)] * len(rates)
    assert result["over_time"][-1]["memory_bytes"] > 2**20, "the stand-in is this process"
    assert 0 < result["gap_ms"]["p50"] <= result["gap_ms"]["p99"]
    assert result["ttft_ms"]["p50"] <= result["ttft_ms"]["p99"]


def is_free(answer: Json, greedy: bool = False) -> bool:
    form = {"tool_choice", "response_format"} & answer["body"].keys()
    return not form and not (greedy and answer["body"]["temperature"])


def says(text: str, *, greedy: bool = True, tie: bool = False) -> Fault:
    """Let long free texts go on with something else, as long as they were; after a near tie."""

    def fault(answer: Json) -> None:
        for key, whole in answer["said"].items():
            if is_free(answer, greedy) and len(whole) > 90:
                begin = whole.partition("a")[0] + "b" if tie else whole[:10]
                other = (begin + text * 90)[: len(whole)]
                answer["said"][key] = other
                answer["tokens"][: len(other)] = map(ord, other)

    return fault


def breaks_form(answer: Json) -> None:
    broken = '{"colour": "red", "count": 700}'
    if answer["call"]:
        answer["call"]["arguments"] = broken
    elif "response_format" in answer["body"]:
        answer["said"]["content"] = broken


def is_empty(answer: Json) -> None:
    if is_free(answer):
        answer |= {"said": {}, "tokens": [], "reason": "stop"}


def loses_text(answer: Json) -> None:
    if is_free(answer, greedy=True):
        answer["said"] = {key: text[:-4] for key, text in answer["said"].items()}


def passes_stop(answer: Json) -> None:
    if "stop" in answer["body"]:
        answer["said"]["content"] = "One. Two."


def stops_early(answer: Json) -> None:
    loses_text(answer)
    if is_free(answer, greedy=True):
        answer |= {"tokens": answer["tokens"][:3], "reason": "stop"}


#: Faults that count in every answer, too, and those that only a sound answer tells.
EVERYWHERE: list[tuple[Fault, set[str]]] = [
    (lambda answer: answer["tokens"].__setitem__(2, BOS), {"control tokens"}),
    (breaks_form, {"broken JSON", "broken tool call"}),
    (lambda answer: answer.update(reason="abort"), {"finish reason"}),
    (lambda answer: answer.update(completion=len(answer["tokens"]) - 1), {"usage"}),
    (passes_stop, {"stop string"}),
    (is_empty, {"empty"}),
]
COMPARED: list[tuple[Fault, set[str]]] = [
    (says("<｜User｜>"), {"control tokens"}),
    (says("他们在河边", greedy=False), {"script"}),
    (says("la "), {"loop"}),
    (says("quiet foxes under heavy snow "), {"other text"}),
    (loses_text, {"truncated"}),
    (stops_early, {"truncated"}),
    (lambda answer: answer.update(reason=None), {"truncated"}),
    (lambda answer: answer.update(prompt=answer["prompt"] - 1), {"usage"}),
]


@pytest.mark.parametrize(("fault", "kinds"), EVERYWHERE + COMPARED)
def test_a_planted_fault_is_found_and_named(fault: Fault, kinds: set[str]) -> None:
    result = soaked(fault)
    assert {each["kind"] for each in result["corrupted"]} == kinds
    assert result["errors"] == result["hangs"] == 0 < result["equal"]


@pytest.mark.parametrize(("fault", "kinds"), [*EVERYWHERE, (says("la ", greedy=False), set())])
def test_a_fault_of_every_answer_counts_once(fault: Fault, kinds: set[str]) -> None:
    result = soaked(fault, always=True)
    told = [(each["id"], each["kind"]) for each in result["corrupted"]]
    assert {kind for _, kind in told} == kinds and len(told) == len({*told})
    assert {each["where"] for each in result["corrupted"]} <= {"alone"}
    assert {*told} <= {(name, kind) for name, found in result["alone"].items() for kind in found}
    assert result["alone"] and (kinds or result["odd"]["loop"] > 0)


ODD = {"la ": "loop", "<｜User｜> and so on ": "control tokens", "\ufffd and on it goes ": "U+FFFD"}


@pytest.mark.parametrize(("text", "kind"), ODD.items())
def test_answers_that_cannot_be_compared_may_be_odd_only_seldom(text: str, kind: str) -> None:
    result = soaked(says(text, greedy=False, tie=True), minutes=0.03)
    [found] = result["corrupted"]
    assert found["kind"] == kind and "cannot be compared" in found["where"]
    assert result["odd"][kind] > 3 and result["near_ties"] > 0


def test_errors_and_hangs_are_counted_and_the_end_of_the_server_ends_the_soak() -> None:
    result = soaked(lambda answer: answer.update(reason="refuse"))
    assert result["errors"] == len(result["failures"]) > 0 == len(result["corrupted"])
    result = soaked(lambda _answer: time.sleep(4.0), silence_s=1.5)
    assert result["hangs"] == len(result["failures"]) > 0 == result["errors"]
    started = time.monotonic()
    assert soaked(lambda answer: answer.update(reason="gone"), minutes=5)["errors"] > 0
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(("fault", "always"), [(None, False), (is_empty, False), (is_empty, True)])
def test_soak_tells_bad_answers(run_command: Run, tmp_path: Path, fault: Any, always: bool) -> None:
    page, file = tmp_path / "soak.html", tmp_path / "soak.json"
    with serving(fault, always=always) as url:
        words = ("bench", "soak", "--base-url", url, "--reference", url, "--minutes", 0.01)
        status, out, errors = run_command(*words, "--json", file, "--page", page)
    result = json.loads(file.read_text())
    assert {"requests", "equal", "near_ties", "corrupted", "errors", "seconds"} <= result.keys()
    assert "near_ties" in out and "<polyline" in page.read_text()
    is_bad = fault is not None
    assert (status, "answers are bad" in errors) == (int(is_bad), is_bad)
    assert ("<h3>" in page.read_text()) == is_bad
    assert ("(empty, alone, of the reference)" in errors and "short-0: empty" in out) == always
