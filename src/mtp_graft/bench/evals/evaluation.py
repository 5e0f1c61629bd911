"""What every quality benchmark is: questions, and for each a program that judges its answer."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from mtp_graft.bench.decode import Report
from mtp_graft.bench.evals.asking import (
    Answer,
    ChatClient,
    Question,
    Stopwatch,
    answer_in,
    answer_unit,
    ask_all,
)
from mtp_graft.bench.evals.sandbox import TIMED_OUT
from mtp_graft.bench.ledger import Ledger
from mtp_graft.bench.streams import Retrying
from mtp_graft.dsv4.acceptance import wilson_interval
from mtp_graft.serving.concurrent import concurrently

NO_ANSWER = "no answer found"
CUT_OFF = "no answer found, cut off"  # the token limit ended it
WRONG = "wrong answer"
UNREADABLE = "unreadable answer"  # beyond what the judge can read: too deep, too many digits
#: What a judge may raise because of what an answer says; any other exception is its own mistake.
JUDGE_ERRORS = (ValueError, RecursionError)


@dataclass(frozen=True)
class Judgement:
    """Whether an answer is right; if not, what kind of failure it is."""

    correct: bool
    kind: str | None = None  # one of the above, or an exception's name
    detail: str = ""


@dataclass(frozen=True)
class Item:
    """A question with its judge; `category` groups items in the result."""

    question: Question
    judge: Callable[[Answer], Judgement]
    category: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """A benchmark, ready to be asked; `settings` are all that chose and shaped its questions."""

    benchmark: str
    items: tuple[Item, ...]
    settings: Mapping[str, Any]

    def claim(self) -> dict[str, Any]:
        """Return what answers in a run folder belong to: the settings and the very questions."""
        asked = [asdict(item.question) for item in self.items]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
        return {**self.settings, "benchmark": self.benchmark, "questions": digest.hexdigest()}


def no_answer(answer: Answer) -> Judgement:
    """Return the judgement of an answer without what was asked for."""
    kind = CUT_OFF if answer.finish_reason == "length" else NO_ANSWER
    return Judgement(False, kind, answer.text[-200:])


def compare(found: str | None, expected: str, answer: Answer) -> Judgement:
    """Return the judgement of what was found in an answer, None being nothing."""
    if found is None:
        return no_answer(answer)
    if found != expected:
        return Judgement(False, WRONG, f"{found}, expected {expected}")
    return Judgement(True)


def run_evaluation(
    evaluation: Evaluation,
    connect: Callable[[], AbstractContextManager[ChatClient]],
    thinking: bool,
    concurrency: int,
    ledger: Ledger,
    retrying: Retrying,
    report: Report,
) -> dict[str, Any]:
    """Ask and judge what the ledger does not have; return the benchmark's JSON.

    `connect` is called only if something is left to ask. Raises Unanswered if questions brought
    no answer: there is no score then.
    """
    items = evaluation.items
    questions = [item.question for item in items]
    if not all(answer_unit(question) in ledger for question in questions):
        with connect() as client:
            stopwatch = Stopwatch(_seconds_so_far(items, ledger))  # not before the server is up
            ask_all(client, questions, thinking, concurrency, ledger, retrying, report, stopwatch)
    _judge_all(items, ledger, report, Stopwatch(_seconds_so_far(items, ledger)))
    return _result(evaluation, ledger)


def _judge_all(items: Sequence[Item], ledger: Ledger, report: Report, stopwatch: Stopwatch) -> None:
    """Put the judgement of every answer into the ledger as `judgement ID`."""
    missing = [item for item in items if _judgement_unit(item) not in ledger]
    for number, (item, judgement) in enumerate(_judgements(missing, ledger), start=1):
        # Half a surrogate pair, which JSON can carry, could not be written or printed later.
        detail = judgement.detail.encode(errors="replace").decode()
        unit = asdict(judgement) | {"detail": detail, "seconds": stopwatch.seconds()}
        ledger.add(_judgement_unit(item), unit)
        report("judging", number, len(missing))


def _judgements(items: Sequence[Item], ledger: Ledger) -> Iterator[tuple[Item, Judgement]]:
    """Judge as many at once as there are processors; what ran out of time once more, alone.

    On a busy machine a right answer can be late. Only the second verdict counts.
    """

    def judge(item: Item) -> tuple[Item, Judgement]:
        answer = answer_in(ledger, item.question)
        try:
            return item, item.judge(answer)
        except JUDGE_ERRORS as error:
            return item, Judgement(False, UNREADABLE, str(error)[:200])

    late = []
    for item, judgement in concurrently(judge, items, len(os.sched_getaffinity(0))):
        if judgement.kind == TIMED_OUT:
            late.append(item)
        else:
            yield item, judgement
    yield from map(judge, late)


def _judgement_unit(item: Item) -> str:
    return f"judgement {item.question.id}"


def _units(items: Sequence[Item], ledger: Ledger) -> Iterator[Mapping[str, Any]]:
    for item in items:
        for name in (answer_unit(item.question), _judgement_unit(item)):
            if name in ledger:
                yield ledger[name]


def _seconds_so_far(items: Sequence[Item], ledger: Ledger) -> float:
    return max((unit["seconds"] for unit in _units(items, ledger)), default=0.0)


def _result(evaluation: Evaluation, ledger: Ledger) -> dict[str, Any]:
    items = evaluation.items
    judged = [(item, ledger[_judgement_unit(item)]) for item in items]
    failures = [
        {"id": item.question.id, "kind": found["kind"], "detail": found["detail"]}
        for item, found in judged
        if not found["correct"]
    ]
    errors = Counter(
        kind for item in items for kind in ledger[answer_unit(item.question)]["errors"]
    )
    correct = len(items) - len(failures)
    return {
        "benchmark": evaluation.benchmark,
        "score": correct / len(items),
        "correct": correct,
        "total": len(items),
        "interval": list(wilson_interval(correct, len(items))),
        "failures": failures,
        "kinds": dict(Counter(failure["kind"] for failure in failures)),
        "seconds": _seconds_so_far(items, ledger),
        "categories": _by_category(judged),
        "retried": dict(errors),
        "settings": dict(evaluation.settings),
    }


def _by_category(judged: Sequence[tuple[Item, Mapping[str, Any]]]) -> dict[str, dict[str, int]]:
    categories: dict[str, dict[str, int]] = {}
    for item, found in judged:
        if item.category is not None:
            counts = categories.setdefault(item.category, {"correct": 0, "total": 0})
            counts["correct"] += bool(found["correct"])
            counts["total"] += 1
    return categories
