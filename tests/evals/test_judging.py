"""How many answers are judged at once, and what becomes of those that were not done in time."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from mtp_graft.bench.evals.asking import Answer, Question, answer_unit
from mtp_graft.bench.evals.evaluation import (
    UNREADABLE,
    Evaluation,
    Item,
    Judgement,
    run_evaluation,
)
from mtp_graft.bench.evals.sandbox import TIMED_OUT
from mtp_graft.bench.ledger import Ledger
from mtp_graft.bench.streams import Retrying

LATE = Judgement(False, TIMED_OUT, "not done after 60 s")


class Judge:
    """Judges an answer by its number, and keeps how often and with how many others it did."""

    def __init__(self, *verdicts: tuple[Judgement, ...]) -> None:
        self.verdicts = verdicts
        self.tries: Counter[int] = Counter()
        self.beside: dict[tuple[int, int], int] = {}  # (answer, its try) -> how many at once
        self.most = 0
        self._lock, self._running = threading.Lock(), 0

    def __call__(self, answer: Answer) -> Judgement:
        number = int(answer.content)
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
            at_try = self.tries[number]
            self.tries[number] += 1
        time.sleep(0.05)
        with self._lock:
            self.beside[number, at_try] = self._running
            self._running -= 1
        return self.verdicts[number][at_try]


def judged(judge: Callable[[Answer], Judgement], *contents: str) -> dict[str, Any]:
    """Return the result on answers that are there already."""
    questions = [Question(f"q/{number}", (), 8) for number in range(len(contents))]
    units = {
        answer_unit(question): asdict(Answer(content, "", "stop")) | {"errors": [], "seconds": 0.0}
        for question, content in zip(questions, contents, strict=True)
    }
    evaluation = Evaluation("code", tuple(Item(question, judge) for question in questions), {})

    def connect() -> Any:
        pytest.fail("nothing is left to ask")

    retrying = Retrying(1, 0.0)
    return run_evaluation(
        *(evaluation, connect, False, 64, Ledger(units=units), retrying, lambda *_: None)
    )


def test_no_more_are_judged_at_once_than_this_process_has_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 3})
    judge = Judge(*[(Judgement(True),)] * 8)
    assert judged(judge, *map(str, range(8)))["correct"] == 8
    assert judge.most == 2


def test_a_verdict_out_of_time_is_judged_once_more_alone_and_that_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2})
    wrong = Judgement(False, "AssertionError")
    judge = Judge(
        (LATE, Judgement(True)), (Judgement(True),), (LATE, LATE), (wrong,), (LATE, wrong)
    )
    result = judged(judge, *map(str, range(5)))
    assert (result["correct"], result["total"]) == (2, 5)
    assert {f["id"]: f["kind"] for f in result["failures"]} == {
        "q/2": TIMED_OUT,
        "q/3": "AssertionError",
        "q/4": "AssertionError",
    }
    assert judge.tries == {0: 2, 1: 1, 2: 2, 3: 1, 4: 2}
    assert [judge.beside[number, 1] for number in (0, 2, 4)] == [1, 1, 1]


def test_an_answer_that_its_judge_cannot_read_has_failed_and_the_others_are_judged() -> None:
    def judge(answer: Answer) -> Judgement:
        if answer.content == "deep":
            return judge(answer)
        return Judgement(int(answer.content) == 1)

    result = judged(judge, "1", "1" * 5000, "deep", "1")
    assert (result["correct"], result["total"]) == (2, 4)
    kinds = {f["id"]: f["kind"] for f in result["failures"]}
    assert kinds == {"q/1": UNREADABLE, "q/2": UNREADABLE}
    assert "digits" in result["failures"][0]["detail"]


def test_a_mistake_of_a_judges_own_is_not_taken_for_a_wrong_answer() -> None:
    def judge(answer: Answer) -> Judgement:
        raise TypeError(answer.content)

    with pytest.raises(TypeError, match="1"):
        judged(judge, "1")
