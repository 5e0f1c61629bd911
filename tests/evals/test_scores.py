"""Servers that know all answers, and servers that are wrong where we say."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.dsv4.acceptance import wilson_interval

from .chat_server import serving
from .conftest import Run

pytestmark = pytest.mark.timeout(300)


def result_of(run: Run, *arguments: object) -> dict[str, Any]:
    status, out, errors = run(*arguments, "--json", "-")
    assert status == 0, errors
    result: dict[str, Any] = json.loads(out)
    assert {"score", "correct", "total", "failures", "seconds"} <= result.keys()
    assert result["score"] == result["correct"] / result["total"]
    assert result["interval"] == list(wilson_interval(result["correct"], result["total"]))
    assert len(result["failures"]) == result["total"] - result["correct"]
    assert sum(result["kinds"].values()) == len(result["failures"])
    return result


def question_in(text: str) -> str:
    return text.partition("\n\nWork it out")[0]


def test_gsm8k_oracle_scores_all(run: Run, gsm8k: dict[str, str], shared_data: Path) -> None:
    arguments = ("bench", "gsm8k", "--data-dir", shared_data, "--limit", 300, "--seed", 7)
    with serving(lambda text: gsm8k[question_in(text)]) as server:
        result = result_of(run, *arguments, "--base-url", server.url, "--concurrency", 8)
    assert (result["correct"], result["total"], result["failures"]) == (300, 300, [])
    assert len(server.bodies) == 300
    for body in server.bodies:
        assert body["path"] == "/v1/chat/completions"
        assert body["temperature"] == 0.0
        assert not body.get("stream")
        assert body["chat_template_kwargs"] == {"thinking": False}


def test_gsm8k_known_mistakes_are_counted_and_classified(
    run: Run, gsm8k: dict[str, str], shared_data: Path
) -> None:
    order = list(gsm8k)

    def say(text: str) -> str | dict[str, Any]:
        number = order.index(question_in(text))
        right = gsm8k[question_in(text)]
        match number % 10:
            case 0:
                return right + "1"  # another number
            case 1:
                return right.replace("####", "So it is")
            case 2:
                return {"content": "First we", "finish_reason": "length"}
            case 3:
                return {"content": "", "reasoning": right}  # thought, but said
            case _:
                return right

    arguments = ("bench", "gsm8k", "--data-dir", shared_data, "--limit", len(order))
    with serving(say) as server:
        result = result_of(run, *arguments, "--base-url", server.url, "--concurrency", 8)
    kinds = ("wrong answer", "no answer found", "no answer found, cut off")
    wrong = [(f"gsm8k/{i}", kinds[i % 10]) for i in range(len(order)) if i % 10 < 3]
    assert [(f["id"], f["kind"]) for f in result["failures"]] == wrong
    assert result["total"] == len(order) == 1319
    assert result["kinds"] == {kinds[0]: 132, kinds[1]: 132, kinds[2]: 132}


def mmlu_key(text: str) -> tuple[str, ...]:
    question, _, rest = text.rpartition("\n\n(A) ")
    choices, _, _ = rest.rpartition("\n\nReason")
    a, _, rest = choices.partition("\n(B) ")
    b, _, rest = rest.partition("\n(C) ")
    return question, a, b, *rest.split("\n(D) ", 1)


def test_mmlu_oracle_scores_all_and_the_subjects_are_mixed_uniformly(
    run: Run, mmlu: dict[tuple[str, ...], str], shared_data: Path
) -> None:
    arguments = ("bench", "mmlu", "--data-dir", shared_data, "--limit", 200)
    with serving(lambda text: f"Clear. The answer is ({mmlu[mmlu_key(text)]}).") as server:
        result = result_of(run, *arguments, "--base-url", server.url, "--concurrency", 8)
    assert (result["correct"], result["total"]) == (200, 200)
    sizes = [counts["total"] for counts in result["categories"].values()]
    assert len(sizes) == 57 and set(sizes) == {3, 4}
    assert {body["max_tokens"] for body in server.bodies} == {128}


def test_mmlu_server_that_always_says_c_scores_the_share_of_c(
    run: Run, mmlu: dict[tuple[str, ...], str], shared_data: Path
) -> None:
    arguments = ("bench", "mmlu", "--data-dir", shared_data, "--limit", 171)
    with serving(lambda _text: "The answer is (C).") as server:
        result = result_of(run, *arguments, "--base-url", server.url, "--concurrency", 8)
    asked = [mmlu[mmlu_key(body["messages"][0]["content"])] for body in server.bodies]
    assert result["correct"] == asked.count("C")
    assert 0 < result["correct"] < 171
    assert result["kinds"] == {"wrong answer": 171 - asked.count("C")}


@pytest.mark.slow
@pytest.mark.usefixtures("whole_sandbox")
def test_humaneval_oracle_scores_all_164(
    run: Run, humaneval: list[dict[str, Any]], shared_data: Path
) -> None:
    def say(text: str) -> str:
        row = problem_in(text, humaneval)
        return f"Here it is:\n```python\n{row['prompt']}{row['canonical_solution']}```\nDone."

    arguments = ("bench", "humaneval", "--data-dir", shared_data)
    with serving(say) as server:
        result = result_of(run, *arguments, "--base-url", server.url, "--concurrency", 8)
    assert (result["correct"], result["total"], result["failures"]) == (164, 164, [])


@pytest.mark.slow
@pytest.mark.usefixtures("whole_sandbox")
def test_humaneval_known_mistakes_are_counted_and_classified(
    run: Run, humaneval: list[dict[str, Any]], shared_data: Path
) -> None:
    """Also the body alone counts, as a completion model gives it; thinking does not."""
    mistakes = [
        ("def {name}_(*args):\n    return 1\n", "NameError"),
        ("def {name}(*args):\n    return object()\n", "AssertionError"),
        ("def {name}(*args):\n    return [].add(1)\n", "AttributeError"),
        ("def {name}(*args):\n    return 1 +\n", "SyntaxError"),
        ("def {name}(*args):\n    raise KeyError(args)\n", "KeyError"),
        ("", "no answer found"),
    ]

    def say(text: str) -> str | dict[str, Any]:
        row = problem_in(text, humaneval)
        number = int(row["task_id"].partition("/")[2]) % 8
        whole = f"{row['prompt']}{row['canonical_solution']}"
        if number < len(mistakes):
            code = mistakes[number][0].format(name=row["entry_point"])
            return {"content": f"```python\n{code}```", "reasoning": f"```python\n{whole}```"}
        return str(row["canonical_solution"]) if number == 6 else whole

    arguments = ("bench", "humaneval", "--data-dir", shared_data)
    with serving(say) as server:
        result = result_of(run, *arguments, "--base-url", server.url, "--concurrency", 8)
    found = {f["id"]: f["kind"] for f in result["failures"]}
    for row in humaneval:
        number = int(row["task_id"].partition("/")[2]) % 8
        expected = mistakes[number][1] if number < len(mistakes) else None
        if expected == "AssertionError" and "assert tuple(candidate(" in row["test"]:
            expected = "TypeError"  # it takes the value apart before it compares
        assert found.get(row["task_id"]) == expected, row["task_id"]
    assert list(found.values()).count("TypeError") == 1
    assert result["correct"] == sum(i % 8 >= len(mistakes) for i in range(164))


def problem_in(text: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if f"```python\n{row['prompt']}```" in text)
