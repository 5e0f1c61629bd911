"""Requests that are timed: an answer is whole, or it is a failure that is counted."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import httpx

from mtp_graft.errors import GraftError, in_words
from mtp_graft.serving.client import READ_ERRORS, Completion, ServerClient, ServerUnreachable

#: Silence after which a request counts as hung. The first may compile kernels.
SILENCE_S = 300.0
#: Any other reason (abort, error) leaves an answer that is not the model's.
WHOLE_REASONS = ("stop", "length", "tool_calls")

Answer = TypeVar("Answer")


class BrokenAnswer(GraftError):
    """An answer that ended before its last chunk, or that cannot be read."""


@dataclass(frozen=True)
class Failure:
    """One attempt that brought no whole answer."""

    request: str
    attempt: int
    kind: str  # timeout, connection, broken or refused
    message: str


@dataclass
class Retrying:
    """Asks again what failed, and keeps every failure; safe to share between threads."""

    attempts: int = 3
    wait_s: float = 1.0
    failures: list[Failure] = field(default_factory=list)

    def ask(self, name: str, request: Callable[[], Answer]) -> Answer:
        """Return the first whole answer of `attempts`; raises the last GraftError."""
        for attempt in range(1, self.attempts + 1):
            try:
                return request()
            except GraftError as error:
                self.failures.append(Failure(name, attempt, _kind(error), str(error)))
                if attempt == self.attempts:
                    raise GraftError(
                        f"{name}: failed {attempt} times in a row, the last time: {error}"
                    ) from error
                time.sleep(self.wait_s)
        raise AssertionError("attempts is at least 1")

    def as_dict(self) -> dict[str, Any]:
        """Return the number of failed attempts and what they were."""
        return {
            "errors": len(self.failures),
            "failures": [asdict(failure) for failure in self.failures],
        }


def _kind(error: GraftError) -> str:
    if isinstance(error, ServerUnreachable):
        return "timeout" if isinstance(error.__cause__, httpx.TimeoutException) else "connection"
    return "broken" if isinstance(error, BrokenAnswer) else "refused"


@dataclass(frozen=True)
class ChatAnswer:
    """A chat's answer, timed, with the server's own counts."""

    completion: Completion
    num_prompt_tokens: int
    num_tool_calls: int
    num_reasoning_chars: int
    num_content_chars: int


class BenchClient(ServerClient):
    """A client for measurements: many streams at once, and a silence that ends."""

    def __init__(
        self, base_url: str, api_key: str | None = None, silence_s: float = SILENCE_S
    ) -> None:
        super().__init__(base_url, api_key)
        headers = self._http.headers
        self._http.close()
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=headers,
            timeout=httpx.Timeout(silence_s, connect=10.0),
            limits=httpx.Limits(max_connections=None),  # a hundred would bound the sweep
            trust_env=False,
        )

    def stream_chat(self, body: Mapping[str, Any]) -> ChatAnswer:
        """Return a chat's answer, streamed to time its tokens; `body` is the request's JSON."""
        options = {"stream": True, "return_token_ids": True}
        usage = {"stream_options": {"include_usage": True}}
        reader = _ChatReader()
        started = time.perf_counter()
        try:
            for event in self._events("/v1/chat/completions", {**body, **options, **usage}):
                reader.read(event, time.perf_counter())
            return reader.answer(self.base_url, started)
        except READ_ERRORS as error:
            raise BrokenAnswer(
                f"{self.base_url}: not a chat's stream ({in_words(error)})"
            ) from error


class _ChatReader:
    """Puts the events of one chat together."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.chunks: list[tuple[float, int]] = []
        self.finish_reason: str | None = None
        self.usage: Mapping[str, Any] | None = None
        self.tool_calls: set[int] = set()
        self.num_reasoning_chars = self.num_content_chars = 0

    def read(self, event: Mapping[str, Any], arrived: float) -> None:
        if not event["choices"]:  # the last event, with the counts alone
            self.usage = event["usage"]
            return
        choice = event["choices"][0]
        new = choice.get("token_ids") or []  # the event that names the role has none
        if new:
            self.tokens += new
            self.chunks.append((arrived, len(new)))
        delta = choice.get("delta", {})
        self.num_content_chars += len(as_text(delta.get("content")))
        self.num_reasoning_chars += len(as_text(delta.get("reasoning")))
        self.tool_calls |= {call["index"] for call in delta.get("tool_calls") or ()}
        self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def answer(self, where: str, started: float) -> ChatAnswer:
        if self.usage is None or self.finish_reason is None:
            raise BrokenAnswer(f"{where}: the stream ended in the middle of an answer")
        check_whole(where, self.finish_reason)
        counted = self.usage["completion_tokens"]
        if counted != len(self.tokens) or not self.tokens:
            raise BrokenAnswer(
                f"{where}: {len(self.tokens)} tokens arrived, the server counted {counted}; "
                "expected the same number, and at least one"
            )
        completion = Completion(tuple(self.tokens), self.finish_reason, started, tuple(self.chunks))
        return ChatAnswer(
            completion,
            self.usage["prompt_tokens"],
            len(self.tool_calls),
            self.num_reasoning_chars,
            self.num_content_chars,
        )


def as_text(found: Any) -> str:
    """Return a field that holds text or null, which is none. Raises TypeError for all else."""
    if found is None:
        return ""
    if not isinstance(found, str):
        raise TypeError(f"{type(found).__name__} instead of a text")
    return found


def check_whole(where: str, finish_reason: str) -> None:
    """Raise BrokenAnswer for a reason that no whole answer ends with."""
    if finish_reason not in WHOLE_REASONS:
        raise BrokenAnswer(f"{where}: an answer that ended with {finish_reason!r}")


def stream_whole(
    client: ServerClient,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    ignore_eos: bool,
    temperature: float,
) -> Completion:
    """Return a streamed continuation that ended with a reason; else BrokenAnswer."""
    try:
        completion = client.stream(
            prompt, max_tokens, ignore_eos=ignore_eos, temperature=temperature
        )
    except READ_ERRORS as error:
        raise BrokenAnswer(
            f"{client.base_url}: not a completion's stream ({in_words(error)})"
        ) from error
    if completion.finish_reason is None:
        raise BrokenAnswer(
            f"{client.base_url}: the stream ended after {len(completion.token_ids)} tokens "
            "without a reason to stop"
        )
    check_whole(client.base_url, completion.finish_reason)
    return completion
