"""Asking questions of a server: chats without streaming, retried, and none asked twice."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from mtp_graft.bench.decode import Report
from mtp_graft.bench.ledger import Ledger
from mtp_graft.bench.streams import BenchClient, BrokenAnswer, Retrying, as_text, check_whole
from mtp_graft.errors import GraftError, in_words
from mtp_graft.serving.client import READ_ERRORS
from mtp_graft.serving.concurrent import concurrently

#: A run ends when this many questions in a row have used up their attempts: the server is gone.
GIVE_UP_AFTER = 3


@dataclass(frozen=True)
class Question:
    """One chat request; `id` names it in results."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    max_tokens: int
    tools: tuple[Mapping[str, Any], ...] = ()

    def body(self, thinking: bool) -> dict[str, Any]:
        """Return the request's JSON, greedy."""
        body = {
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "chat_template_kwargs": {"thinking": thinking},
        }
        return body | {"tools": list(self.tools)} if self.tools else body


@dataclass(frozen=True)
class Answer:
    """What came back; `content` is empty if the model was still thinking at its last token."""

    content: str
    reasoning: str
    finish_reason: str | None  # stop, length or tool_calls
    tool_calls: tuple[Mapping[str, str], ...] = ()  # `name` and `arguments` (JSON) each

    @property
    def text(self) -> str:
        """Return the content, or what was thought if there is none."""
        return self.content if self.content.strip() else self.reasoning


class ChatClient(BenchClient):
    """A client that asks whole answers; thread-safe."""

    def chat(self, body: Mapping[str, Any]) -> Answer:
        """Return a chat's answer. Raises GraftError for any that is not whole and readable."""
        found = self._send("POST", "/v1/chat/completions", json=dict(body)).json()
        try:
            choice = found["choices"][0]
            message = choice["message"]
            calls = [call["function"] for call in message.get("tool_calls") or ()]
            answer = Answer(
                as_text(message.get("content")),
                as_text(message.get("reasoning")),
                choice.get("finish_reason"),
                tuple({key: as_text(c[key]) for key in ("name", "arguments")} for c in calls),
            )
        except READ_ERRORS as error:
            raise BrokenAnswer(
                f"{self.base_url}: not a chat's answer ({in_words(error)})"
            ) from error
        # Not every server gives a reason; without streaming, an answer that arrives is whole.
        if answer.finish_reason is not None:
            check_whole(self.base_url, answer.finish_reason)
        return answer


class Stopwatch:
    """The seconds that a benchmark has taken, those of earlier sessions included."""

    def __init__(self, so_far: float) -> None:
        self._origin = time.monotonic() - so_far

    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.monotonic() - self._origin


@dataclass
class _Failing:
    """Questions without an answer, and how many of them came one after the other."""

    kinds: dict[str, str] = field(default_factory=dict)  # id -> the last attempt's message
    in_a_row: int = 0


class Unanswered(GraftError):
    """Questions are left that brought no answer; they are not scored."""


def ask_all(
    client: ChatClient,
    questions: Sequence[Question],
    thinking: bool,
    concurrency: int,
    ledger: Ledger,
    retrying: Retrying,
    report: Report,
    stopwatch: Stopwatch,
) -> None:
    """Put the answer of every question into `ledger` as `answer ID`.

    What the ledger has is not asked. An attempt that fails is repeated as `retrying` says; a
    question whose attempts all failed is left out, and Unanswered is raised in the end.
    """
    missing = [question for question in questions if answer_unit(question) not in ledger]
    failing = _Failing()

    def ask(question: Question) -> tuple[Question, Answer | None]:
        if failing.in_a_row >= GIVE_UP_AFTER:
            return question, None
        try:
            answer = retrying.ask(question.id, partial(client.chat, question.body(thinking)))
        except GraftError as error:
            failing.kinds[question.id] = str(error)
            failing.in_a_row += 1
            return question, None
        failing.in_a_row = 0
        return question, answer

    done = len(questions) - len(missing)
    report("asking", done, len(questions))
    for question, answer in concurrently(ask, missing, concurrency):
        if answer is None:
            continue
        errors = [f.kind for f in list(retrying.failures) if f.request == question.id]
        unit = asdict(answer) | {"errors": errors, "seconds": stopwatch.seconds()}
        ledger.add(answer_unit(question), unit)
        done += 1
        report("asking", done, len(questions))
    if done < len(questions):
        reason = next(iter(failing.kinds.values()))
        raise Unanswered(f"{len(questions) - done} of {len(questions)} questions left: {reason}")


def answer_unit(question: Question) -> str:
    """Return the name of a question's answer in the ledger."""
    return f"answer {question.id}"


def answer_in(ledger: Ledger, question: Question) -> Answer:
    """Return the answer that the ledger has."""
    unit = ledger[answer_unit(question)]
    calls = tuple(unit["tool_calls"])
    return Answer(unit["content"], unit["reasoning"], unit["finish_reason"], calls)
