"""Ask one request of a soak: what came of it, and when."""

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from mtp_graft.bench.soak.mix import Request
from mtp_graft.errors import GraftError, in_words
from mtp_graft.serving.client import READ_ERRORS, ServerClient

_PATH = "/v1/chat/completions"
_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_LOGPROBS = {"logprobs": True, "top_logprobs": 10, "return_tokens_as_token_ids": True}


@dataclass
class Answer:
    """An answer, put together if it was streamed."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)  # name and arguments, by index
    token_ids: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)  # when tokens came, since the request
    logprobs: list[dict[int, float]] = field(default_factory=list)  # of each place's best tokens
    finish_reason: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)

    @property
    def said(self) -> tuple[str, str, list[list[str]]]:
        """Return all that a user sees."""
        return self.reasoning, self.content, [*self.calls.values()]


def ask(client: ServerClient, request: Request, *, with_logprobs: bool = False) -> Answer:
    """Return the answer, or what came before the client hung up.

    Raises GraftError if there is none or it cannot be read, NoAnswerInTime if the server is silent.
    """
    body = {**request.body, "return_token_ids": True, **(_LOGPROBS if with_logprobs else {})}
    body |= _STREAMED if request.streamed else {}
    answer, started = Answer(), time.perf_counter()
    try:
        with closing(client.events(_PATH, body)) as events:
            for event in events:
                _add(answer, event, time.perf_counter() - started)
                if request.hang_up_after and len(answer.at_s) >= request.hang_up_after:
                    break
    except READ_ERRORS as error:
        raise GraftError(f"{client.base_url}{_PATH}: not a chat ({in_words(error)})") from error
    return answer


def _add(answer: Answer, event: Mapping[str, Any], at_s: float) -> None:
    answer.usage = event.get("usage") or answer.usage
    for choice in event["choices"]:  # none in the last event, which has the counts alone
        said = choice["delta"] if "delta" in choice else choice["message"]
        answer.content += said.get("content") or ""
        answer.reasoning += said.get("reasoning") or ""
        for number, call in enumerate(said.get("tool_calls") or ()):
            whole = answer.calls.setdefault(call.get("index", number), ["", ""])
            for place, part in enumerate(("name", "arguments")):
                whole[place] += call["function"].get(part) or ""
        if new := choice.get("token_ids"):
            answer.token_ids += new
            answer.at_s.append(at_s)
        for place in (choice.get("logprobs") or {}).get("content") or ():
            tops = (place, *place["top_logprobs"])
            best = {int(top["token"].removeprefix("token_id:")): top["logprob"] for top in tops}
            answer.logprobs.append(best)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
