"""What the speed benchmarks ask: requests that are timed, asked again if they fail, and kept."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.manifest import claim_folder, read_result
from mtp_graft.errors import GraftError, in_words
from mtp_graft.serving.client import READ_ERRORS, ServerClient, ServerUnreachable

#: Any other reason (abort, error) leaves an answer that is not the model's.
WHOLE_REASONS = ("stop", "length", "tool_calls")
UNITS_NAME = "units.json"

#: One streamed answer, as JSON: see `time_answer`.
Answer = dict[str, Any]
Found = TypeVar("Found")


class BrokenAnswer(GraftError):
    """An answer that ended before its last chunk, or that cannot be read."""


def time_answer(client: ServerClient, path: str, body: Mapping[str, Any]) -> Answer:
    """Stream the answer to a completion or a chat; return its tokens, times and drafts.

    Keys: `token_ids`; `finish_reason`; `chunks`, [seconds since the request, number of tokens]
    each; `texts`, what each chunk adds; `prompt_tokens`; `completion_tokens`; `counters`, as
    SpecDecodeCounters, null if the server does not draft. Raises BrokenAnswer.
    """
    options = {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    answer: Answer = {"token_ids": [], "finish_reason": None, "chunks": [], "texts": []}
    before = client.spec_decode_counters()
    started = time.perf_counter()
    try:
        for event in client.events(path, {**body, **options}):
            _add_event(answer, event, time.perf_counter() - started)
    except READ_ERRORS as error:
        problem = f"not a stream of vLLM's ({in_words(error)})"
        raise BrokenAnswer(f"{client.base_url}{path}: {problem}") from error
    arrived, counted = len(answer["token_ids"]), answer.get("completion_tokens")
    if answer["finish_reason"] not in WHOLE_REASONS or not arrived or arrived != counted:
        raise BrokenAnswer(
            f"{client.base_url}: the stream ended after {arrived} tokens (reason "
            f"{answer['finish_reason']!r}, {counted} by the server's count); expected all "
            f"tokens, at least one, and a reason out of {', '.join(WHOLE_REASONS)}"
        )
    after = client.spec_decode_counters()
    counters = None if before is None or after is None else asdict(after - before)
    return answer | {"counters": counters}


def _add_event(answer: Answer, event: Mapping[str, Any], arrived_s: float) -> None:
    if usage := event.get("usage"):
        answer |= {key: usage[key] for key in ("prompt_tokens", "completion_tokens")}
    for choice in event["choices"]:  # none in the last event, which has the counts alone
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        if new := choice.get("token_ids"):
            answer["token_ids"] += new
            answer["chunks"].append([arrived_s, len(new)])
            answer["texts"].append("")
        if text and answer["texts"]:  # or the rest of a character that began before
            answer["texts"][-1] += text
        answer["finish_reason"] = choice.get("finish_reason") or answer["finish_reason"]


@dataclass
class Session:
    """Measures units by name, asks again what fails, and keeps both; a file makes it last."""

    attempts: int = 3
    wait_s: float = 1.0
    path: Path | None = None
    units: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, name: str, request: Callable[[], Found]) -> Found:
        """Return the unit, measured before or now."""
        if name not in self.units:
            self.keep(name, self.ask(name, request))
        found: Found = self.units[name]
        return found

    def keep(self, name: str, unit: Any) -> None:
        """Add a unit that is JSON; it is on the disk afterwards."""
        self.units[name] = unit
        if self.path is not None:
            write_json({"units": self.units, "failures": self.failures}, self.path)

    def ask(self, name: str, request: Callable[[], Found]) -> Found:
        """Return the first whole answer of `attempts`; raises the last GraftError."""
        for attempt in range(1, self.attempts + 1):
            try:
                return request()
            except GraftError as error:
                failure = {"request": name, "attempt": attempt, "kind": _kind(error)}
                self.failures.append(failure | {"message": str(error)})
                if attempt == self.attempts:
                    raise GraftError(f"{name}: failed {attempt} times, at last: {error}") from error
                time.sleep(self.wait_s)
        raise AssertionError("attempts is at least 1")

    def as_result(self) -> dict[str, Any]:
        """Return the number of failed attempts and what they were."""
        return {"errors": len(self.failures), "failures": self.failures}


def open_session(folder: Path | None, claim: Mapping[str, Any], attempts: int = 3) -> Session:
    """Return the session of a benchmark in `folder`, with what it has measured before.

    `claim` is all that decides what is measured; None keeps nothing. Raises GraftError if the
    folder was begun with another claim.
    """
    if folder is None:
        return Session(attempts)
    claim_folder(folder, claim)
    kept = read_result(folder / UNITS_NAME) or {"units": {}, "failures": []}
    return Session(attempts, 1.0, folder / UNITS_NAME, **kept)


def _kind(error: GraftError) -> str:
    if isinstance(error, ServerUnreachable):
        return "timeout" if isinstance(error.__cause__, httpx.TimeoutException) else "connection"
    return "broken" if isinstance(error, BrokenAnswer) else "refused"
