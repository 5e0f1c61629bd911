"""What the speed benchmarks share: requests that are timed, and results that are kept."""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.manifest import read_result
from mtp_graft.errors import GraftError, in_words
from mtp_graft.serving.client import READ_ERRORS, ServerClient

STREAM = {"stream": True, "stream_options": {"include_usage": True}}
#: Any other reason (abort, error) leaves an answer that is not the model's.
WHOLE_REASONS = ("stop", "length", "tool_calls")

#: Called with what is going on, how much of it is done, and of how much (0: not known).
Report = Callable[[str, int, int], None]
#: One streamed answer, as JSON: see `time_answer`.
Answer = dict[str, Any]


def measured(folder: Path, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a part of a benchmark: from `folder` if an earlier call kept it, else measured now."""
    path = folder / f"{name}.json"
    found = read_result(path)
    if found is None:
        found = measure()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(found, path)
    return found


def time_answer(client: ServerClient, path: str, body: Mapping[str, Any]) -> Answer:
    """Stream the answer to a completion or a chat; return its tokens, times and drafts.

    Keys: `token_ids`; `finish_reason`; `chunks`, [seconds since the request, number of tokens]
    each; `texts`, what each chunk adds; `prompt_tokens`; `completion_tokens`; `counters`, as
    SpecDecodeCounters, null if the server does not draft. Raises GraftError for an answer that is
    not whole or cannot be read.
    """
    before = client.spec_decode_counters()
    answer = read_answer(client, path, {**body, **STREAM, "return_token_ids": True})
    arrived, counted = len(answer["token_ids"]), answer.get("completion_tokens")
    if answer["finish_reason"] not in WHOLE_REASONS or not arrived or arrived != counted:
        raise GraftError(
            f"{client.base_url}: the stream ended after {arrived} tokens (reason "
            f"{answer['finish_reason']!r}, {counted} by the server's count); expected all "
            f"tokens, at least one, and a reason out of {', '.join(WHOLE_REASONS)}"
        )
    after = client.spec_decode_counters()
    counters = None if before is None or after is None else asdict(after - before)
    return answer | {"counters": counters}


def read_answer(
    client: ServerClient, path: str, body: dict[str, Any], hang_up_after: int = 0
) -> Answer:
    """Return an answer, streamed or not, whole or not, or so many chunks of it.

    Keys: those of `time_answer` but for `counters`, and where there are any `reasoning`, `calls`
    by index, [name, arguments] each, and `logprobs`, of each token the best tokens'.
    """
    answer: Answer = {"token_ids": [], "finish_reason": None, "chunks": [], "texts": []}
    started = time.perf_counter()
    try:
        with closing(client.events(path, body)) as events:
            for event in events:
                _add_event(answer, event, time.perf_counter() - started)
                if hang_up_after and len(answer["chunks"]) >= hang_up_after:
                    break
    except READ_ERRORS as error:
        problem = f"not an answer of vLLM's ({in_words(error)})"
        raise GraftError(f"{client.base_url}{path}: {problem}") from error
    return answer


def _add_event(answer: Answer, event: Mapping[str, Any], arrived_s: float) -> None:
    if usage := event.get("usage"):
        answer |= {key: usage[key] for key in ("prompt_tokens", "completion_tokens")}
        answer["total_tokens"] = usage.get("total_tokens")
    for choice in event["choices"]:  # none in the last event, which has the counts alone
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        if new := choice.get("token_ids"):
            answer["token_ids"] += new
            answer["chunks"].append([arrived_s, len(new)])
            answer["texts"].append("")
        if (text := said.get("content")) and answer["texts"]:  # or the rest of a character
            answer["texts"][-1] += text
        if reasoning := said.get("reasoning"):
            answer["reasoning"] = answer.get("reasoning", "") + reasoning
        for number, call in enumerate(said.get("tool_calls") or ()):
            whole = answer.setdefault("calls", {}).setdefault(call.get("index", number), ["", ""])
            for place, part in enumerate(("name", "arguments")):
                whole[place] += call["function"].get(part) or ""
        for place in (choice.get("logprobs") or {}).get("content") or ():
            tops = {top["token"]: top["logprob"] for top in (place, *place["top_logprobs"])}
            answer.setdefault("logprobs", []).append(tops)
        answer["finish_reason"] = choice.get("finish_reason") or answer["finish_reason"]


class Timing(NamedTuple):
    """How long an answer took, and how many of its tokens came after the first chunk."""

    ttft_s: float  # from the request to the first chunk
    decode_s: float  # from the first chunk to the last
    num_decoded: int  # all tokens but one, as a rule


def timing(answer: Answer) -> Timing:
    """Return when an answer's tokens came."""
    (first_s, first_size), (last_s, _) = answer["chunks"][0], answer["chunks"][-1]
    return Timing(first_s, last_s - first_s, len(answer["token_ids"]) - first_size)
