"""Clients that are killed while they ask, or while they judge, and started again."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from killing import TIMES, kill_in_the_middle, units_in, without
from mtp_graft.bench.evals.sandbox import Sandbox, Task, Verdict
from mtp_graft.bench.ledger import LEDGER_NAME

from .chat_server import ChatServer, Message, Say, serving
from .conftest import Run
from .test_capability import TASKS, task_of

COMMAND = (sys.executable, "-c", "from mtp_graft.cli import main; main()")
DELAY_S = 0.1  # of an answer, while the client lives that will be killed


def gsm8k_answer(text: str) -> str:
    number = number_in(r"Ten times (\d+)", text)
    return "none" if number == 4 else f"#### {10 * number}"


def humaneval_answer(text: str) -> str:
    number = number_in(r"def times_(\d+)", text)
    sign = "+" if number == 4 else "*"
    return f"```python\ndef times_{number}(x):\n    return {number} {sign} x\n```"


def mmlu_answer(text: str) -> str:
    return f"The answer is ({'A' if text.startswith('sums 4?') else 'B'})."


def capability_answer(text: str) -> str | Message:
    _, right, [(wrong, _), *_] = TASKS[task_of(text)]
    said: str | Message = wrong if task_of(text) == "math/rates" else right
    return said


def number_in(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None
    return int(found[1])


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's questions, and answers that are right but for one."""

    say: Say
    num_questions: int
    failure: tuple[str, str]  # the id and kind
    data: str | None = None  # the fixture with the folder
    options: tuple[str, ...] = ()


BENCHMARKS = {
    "gsm8k": Benchmark(
        *(gsm8k_answer, 12, ("gsm8k/4", "no answer found"), "own_gsm8k", ("--limit", "12"))
    ),
    "humaneval": Benchmark(
        *(humaneval_answer, 12, ("HumanEval/4", "AssertionError"), "own_humaneval")
    ),
    "mmlu": Benchmark(
        *(mmlu_answer, 12, ("mmlu/sums/4", "wrong answer"), "own_mmlu", ("--limit", "12"))
    ),
    "capability": Benchmark(capability_answer, 14, ("capability/math/rates", "wrong answer")),
}
JUDGED_IN_A_SANDBOX = ("humaneval", "capability")
Words = Callable[[str, ChatServer], list[str]]


@pytest.fixture
def words(request: pytest.FixtureRequest) -> Words:
    """Return a function that gives a benchmark's command line, but for its run folder."""

    def command(name: str, server: ChatServer) -> list[str]:
        benchmark = BENCHMARKS[name]
        found = ["bench", name, "--base-url", server.url, "--concurrency", "1", *benchmark.options]
        if benchmark.data is not None:
            found += ["--data-dir", str(request.getfixturevalue(benchmark.data))]
        return found

    return command


def questions_asked(server: ChatServer) -> Counter[str]:
    return Counter(json.dumps(body["messages"]) for body in server.bodies)


def result_in(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_client_killed_while_it_asks_asks_nothing_twice_and_gives_the_same_result(
    request: pytest.FixtureRequest, run: Run, words: Words, tmp_path: Path, name: str
) -> None:
    if name in JUDGED_IN_A_SANDBOX:
        request.getfixturevalue("whole_sandbox")
    benchmark = BENCHMARKS[name]
    killed, whole = (tmp_path / folder / "bench" / name for folder in ("killed", "whole"))
    ledger = killed / LEDGER_NAME
    with serving(benchmark.say, DELAY_S) as server:
        command = words(name, server)
        kept = kill_in_the_middle(
            [*COMMAND, *command, "--run", str(tmp_path / "killed")],
            *(ledger, 3, lambda: len(server.bodies)),
        )
        before = questions_asked(server)
        server.bodies.clear()
        server.delay_s = 0.0
        status, _, errors = run(*command, "--run", tmp_path / "killed")
        assert status == 0, errors
        again = questions_asked(server)
        assert run(*command, "--run", tmp_path / "whole")[0] == 0
    num_kept = len(units_in(kept))
    assert 3 <= num_kept < benchmark.num_questions
    assert ledger.read_bytes().startswith(kept)
    assert again.total() == benchmark.num_questions - num_kept
    assert len(before & again) <= 1, "the one that was being answered when the client was killed"

    result, expected = result_in(killed), result_in(whole)
    assert without(result, TIMES) == without(expected, TIMES)
    assert [(f["id"], f["kind"]) for f in result["failures"]] == [benchmark.failure]
    assert result["seconds"] > num_kept * DELAY_S, "those of both sessions"


@pytest.mark.usefixtures("whole_sandbox")
def test_a_client_killed_while_it_judges_asks_nothing_and_judges_only_what_is_left(
    run: Run, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(text: str) -> str:
        return humaneval_answer(text).replace("return", "__import__('time').sleep(0.1)\n    return")

    judged: list[str] = []
    judge = Sandbox.judge

    def noted(sandbox: Sandbox, task: Task) -> Verdict:
        judged.append(task.entry_point)
        return judge(sandbox, task)

    monkeypatch.setattr(Sandbox, "judge", noted)
    killed, whole = (tmp_path / folder / "bench" / "humaneval" for folder in ("killed", "whole"))
    ledger = killed / LEDGER_NAME
    with serving(say) as server:
        command = words("humaneval", server)
        kept = kill_in_the_middle(
            [*COMMAND, *command, "--run", str(tmp_path / "killed")],
            *(ledger, 12 + 2, lambda: len(units_in(ledger.read_bytes()))),
        )
        server.bodies.clear()
        status, _, errors = run(*command, "--run", tmp_path / "killed")
        assert status == 0, errors
        assert server.bodies == []
        verdicts = {name.partition("HumanEval/")[2] for name in units_in(kept)[12:]}
        left = [f"times_{i}" for i in range(12) if str(i) not in verdicts]
        assert 2 <= len(verdicts) < 12
        assert sorted(judged) == sorted(left)
        assert run(*command, "--run", tmp_path / "whole")[0] == 0
    assert ledger.read_bytes().startswith(kept)
    assert without(result_in(killed), TIMES) == without(result_in(whole), TIMES)
    assert result_in(killed)["correct"] == 11
