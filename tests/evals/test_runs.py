"""Servers that fail, clients that are killed, and mistakes of users."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (extra `evals`)")

from tenacity import wait_fixed

from mtp_graft.bench.evals import run as module

from .chat_server import ChatServer, Message, serving

pytestmark = pytest.mark.timeout(600)
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let failed requests be asked again almost at once."""
    monkeypatch.setattr(module.OpenAICompatibleAPI, "retry_wait", lambda _self: wait_fixed(0.01))


def right(text: str) -> str:
    if found := re.search(r"Ten times (\d+)", text):
        return f"#### {10 * int(found[1])}"
    if found := re.search(r"def times_(\d+)", text):
        return f"```python\ndef times_{found[1]}(x):\n    return {found[1]} * x\n```"
    return "The answer is (B)."


def command(name: str, server: ChatServer, data: Path, *more: object) -> list[object]:
    return ["bench", name, "--base-url", server.url, "--data-dir", data, "--limit", 12, *more]


#: Benchmark -> part of a question -> what is said to it, and as what it counts.
MISTAKES: dict[str, dict[str, tuple[str | Message, str | None]]] = {
    "gsm8k": {
        "times 3?": ("#### 31", "wrong answer"),
        "times 4?": ("So it is 40", "no answer found"),
        "times 5?": ({"content": "First", "finish_reason": "length"}, "no answer found, cut off"),
        "times 6?": ({"content": "#### 61", "reasoning": "#### 60"}, "wrong answer"),
        "times 7?": ("what\ud800", "no answer found"),
    },
    "mmlu": {"sums 2?": ("The answer is (A).", "wrong answer")},
    "humaneval": {
        "times_2(": ("```python\ndef times_2(x):\n    return 1\n```", "AssertionError"),
        "times_3(": ({"content": None, "reasoning": "..."}, "no answer found"),
    },
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("sandbox")
def test_right_answers_and_mistakes_are_counted(mtp_graft: Run, data: Path, name: str) -> None:
    mistakes = MISTAKES[name]

    def say(text: str) -> str | Message:
        return next((said for part, (said, _) in mistakes.items() if part in text), right(text))

    with serving(say) as server:
        result = mtp_graft(*command(name, server, data))
    expected = Counter(kind for _, kind in mistakes.values() if kind)
    assert result["kinds"] == expected == Counter(f["kind"] for f in result["failures"])
    assert (result["correct"], result["total"]) == (12 - expected.total(), 12)
    assert result["score"] == result["correct"] / 12
    assert len(server.bodies) == 12
    for body in server.bodies:
        assert body["path"] == "/v1/chat/completions"
        assert (body["temperature"], body.get("stream", False)) == (0.0, False)
        assert body["chat_template_kwargs"] == {"thinking": False}


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_counts_in_whatever_field_it_comes(mtp_graft: Run, data: Path, seed: int) -> None:
    random = Random(seed)

    def say(text: str) -> Message:
        answer, field = right(text), random.choice(["reasoning", "reasoning_content"])
        content = random.choice([answer, f"\n{answer}", None, "", " \n\t"])
        is_there = bool((content or "").strip())
        thought = random.choice(["#### 1", "", None]) if is_there else f"So: 7.\n{answer}"
        return {"content": content, field: thought}

    with serving(say) as server:
        assert mtp_graft(*command("gsm8k", server, data, "--thinking"))["correct"] == 12


def test_a_failed_request_is_asked_again_and_is_no_wrong_answer(mtp_graft: Run, data: Path) -> None:
    failures: dict[str, list[str | Message]] = {"times 1?": ["500", "500"], "times 3?": ["closes"]}
    failures |= {"times 4?": ["garbage"], "times 5?": ["aborts"]}
    failures |= {"times 6?": [{"content": ["#### 60"]}]}

    def say(text: str) -> str | Message:
        for part, left in failures.items():
            if part in text and left:
                return left.pop()
        return right(text)

    with serving(say) as server:
        assert mtp_graft(*command("gsm8k", server, data, "--thinking"))["correct"] == 12
    assert len(server.bodies) == 12 + 6
    assert all(body["chat_template_kwargs"] == {"thinking": True} for body in server.bodies)


@pytest.mark.parametrize(("failure", "times"), [("500", 3), ("400", 1)])
def test_a_rerun_asks_what_is_left(mtp_graft: Run, data: Path, failure: str, times: int) -> None:
    broken = True

    def say(text: str) -> str:
        return failure if broken and "times 3?" in text else right(text)

    with serving(say) as server:
        words = command("gsm8k", server, data, "--run", "run", "--concurrency", 1)
        error = mtp_graft(*words)
        assert re.search(r"error: gsm8k: \d+ of 12 questions left: .*(out of luck|64 tok)", error)
        assert not Path("run/bench/gsm8k/result.json").exists()
        asked = server.asked()
        assert asked[-times:] == ["Ten times 3?"] * times == [q for q in asked if "3?" in q]

        broken = False
        server.bodies.clear()
        result = mtp_graft(*words)
        assert result["correct"] == 12
        assert not set(server.asked()) & set(asked[:-times])

        server.bodies.clear()
        assert mtp_graft(*words) == result
        assert server.bodies == [], "it was finished"
        assert "was begun with seed = 0" in mtp_graft(*words, "--seed", 1)
    assert f"{server.url}: names no model" in mtp_graft(*command("gsm8k", server, data))


def test_a_mistake_is_one_message_before_anything_is_asked(run_command: Run, data: Path) -> None:
    Path("file").touch()
    for name, *more, message in (
        ("capability", "leave out --data-dir"),
        ("gsm8k", "--limit", 13, "there are 12 questions, --limit asks for 13"),
        ("mmlu", "--data-dir", "nowhere", "has no mmlu/test/*_test.csv"),
        ("gsm8k", "--run", "file", "error: "),
    ):
        with serving(right) as server:
            status, out, errors = run_command(*command(name, server, data, *more))
        assert (status, out, server.bodies) == (2 if name == "capability" else 1, "", [])
        assert message in errors and "Traceback" not in errors
