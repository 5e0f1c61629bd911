"""Fifteen requests as people make them: chats with a system prompt and tools, no token cap."""

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.resources import files
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from mtp_graft.bench.decode import Answer, measured, time_answer, timing
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.server import Report

_PATH = "/v1/chat/completions"


class Request(NamedTuple):
    """One request of the workload."""

    id: str
    category: str
    body: dict[str, Any]


def load_workload(thinking: bool = False, max_tokens: int | None = None) -> list[Request]:
    """Return the package's own requests; without `max_tokens` the context alone ends an answer."""
    found = json.loads((files("mtp_graft.bench") / "workload.json").read_text("utf-8"))
    options = {"tools": found["tools"], "temperature": 0.0}
    options["chat_template_kwargs"] = {"thinking": thinking}
    options |= {} if max_tokens is None else {"max_tokens": max_tokens}
    system = {"role": "system", "content": found["system"]}
    requests = []
    for task in found["tasks"]:
        document = found["documents"].get(task.get("document"), [])
        user = {"role": "user", "content": "\n\n".join([*document, task["text"]])}
        body = {"messages": [system, user], **options}
        requests.append(Request(task["id"], task["category"], body))
    return requests


def measure_workload(
    connect: Callable[[], ServerClient], requests: Sequence[Request], report: Report, folder: Path
) -> dict[str, Any]:
    """Ask every request, one at a time, after a short one as warm-up; return the JSON.

    `connect` is called once, and only if `folder` does not have all. GraftError if one fails.
    """

    @cache
    def warm_client() -> ServerClient:
        client = connect()
        report("workload: warm-up", 0, 0)
        time_answer(client, _PATH, requests[0].body | {"max_tokens": 8})
        return client

    def measure(done: int, request: Request) -> dict[str, Any]:
        client = warm_client()
        report(f"workload: {request.id}", done, len(requests))
        return _result(request, time_answer(client, _PATH, request.body))

    found = [measured(folder, r.id, partial(measure, n, r)) for n, r in enumerate(requests)]
    # Requests of one category stand together.
    categories = {name: _summary([*of]) for name, of in groupby(found, itemgetter("category"))}
    return {**_summary(found), "categories": categories, "tasks": found}


def _result(request: Request, answer: Answer) -> dict[str, Any]:
    """Return a request's JSON; an answer in one chunk has no decode speed."""
    (ttft_s, decode_s, num_decoded), counters = timing(answer), answer["counters"] or {}
    return {
        "id": request.id,
        "category": request.category,
        **{key: answer[key] for key in ("prompt_tokens", "completion_tokens", "finish_reason")},
        "decode_tok_s": num_decoded / decode_s if num_decoded else None,
        "ttft_ms": 1e3 * ttft_s,
        "drafted": counters.get("num_draft_tokens", 0),
        "accepted": counters.get("num_accepted_tokens", 0),
    }


def _summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of the requests' speeds (as the Acti card has it), and what they took."""
    speeds = [each["decode_tok_s"] for each in found if each["decode_tok_s"] is not None]
    drafted = sum(each["drafted"] for each in found)
    return {
        "decode_tok_s": mean(speeds) if speeds else None,
        "ttft_ms": median(each["ttft_ms"] for each in found),
        "acceptance": sum(each["accepted"] for each in found) / drafted if drafted else None,
        "requests": len(found),
        "completion_tokens": sum(each["completion_tokens"] for each in found),
        "cut_off": sum(each["finish_reason"] == "length" for each in found),
    }
