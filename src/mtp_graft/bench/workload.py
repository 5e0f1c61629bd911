"""Fifteen requests as people make them: chats with a system prompt and tools, no token cap."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from statistics import mean, median
from typing import Any

from mtp_graft.bench.requests import (
    Answer,
    Report,
    decode_s,
    measured,
    num_decoded,
    time_answer,
    ttft_s,
)
from mtp_graft.serving.client import ServerClient

CATEGORIES = ("chat", "coding", "retrieval", "writing", "planning")


@dataclass(frozen=True)
class Task:
    """One request of the workload."""

    id: str
    category: str
    text: str  # the user's message


@dataclass(frozen=True)
class Workload:
    """The requests, and what all of them have in common."""

    system: str
    tools: tuple[Mapping[str, Any], ...]
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class WorkloadConfig:
    """How the requests are asked."""

    thinking: bool = False
    max_tokens: int | None = None  # None: until the model ends, or the context is full


def load_workload() -> Workload:
    """Return the workload that comes with the package; all of it was written for it."""
    found = json.loads((files("mtp_graft.bench") / "workload.json").read_text("utf-8"))
    tasks = []
    for task in found["tasks"]:
        document = found["documents"][task["document"]] if "document" in task else []
        tasks.append(Task(task["id"], task["category"], "\n\n".join([*document, task["text"]])))
    return Workload(found["system"], tuple(found["tools"]), tuple(tasks))


def measure_workload(
    connect: Callable[[], ServerClient],
    workload: Workload,
    config: WorkloadConfig,
    report: Report,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Ask every request of the workload, one at a time, greedily; return speeds and acceptance.

    `connect` is called once, and only if something is left to ask that `folder` does not have. A
    short request comes first, as warm-up. Raises GraftError if a request fails.
    """

    @cache
    def warm_client() -> ServerClient:
        client = connect()
        report("workload: warm-up", 0, 0)
        ask(client, workload.tasks[0], max_tokens=8)
        return client

    def ask(client: ServerClient, task: Task, **limit: int) -> Answer:
        body = _body(workload, task, config) | limit
        return time_answer(client, "/v1/chat/completions", body)

    def measure(done: int, task: Task) -> dict[str, Any]:
        client = warm_client()
        report(f"workload: {task.id}", done, len(workload.tasks))
        return _task_result(task, ask(client, task))

    tasks = enumerate(workload.tasks)
    found = [measured(folder, task.id, partial(measure, done, task)) for done, task in tasks]
    return workload_result(found, config)


def _body(workload: Workload, task: Task, config: WorkloadConfig) -> dict[str, Any]:
    body: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": workload.system},
            {"role": "user", "content": task.text},
        ],
        "tools": list(workload.tools),
        "temperature": 0.0,
        "chat_template_kwargs": {"thinking": config.thinking},
    }
    return body if config.max_tokens is None else body | {"max_tokens": config.max_tokens}


def _task_result(task: Task, answer: Answer) -> dict[str, Any]:
    """Return a request's JSON; an answer in one chunk has no decode speed."""
    decoded, seconds, counters = num_decoded(answer), decode_s(answer), answer["counters"] or {}
    return {
        "id": task.id,
        "category": task.category,
        **{key: answer[key] for key in ("prompt_tokens", "completion_tokens", "finish_reason")},
        "decoded_tokens": decoded,
        "decode_s": seconds,
        "decode_tok_s": decoded / seconds if decoded else None,
        "ttft_ms": 1e3 * ttft_s(answer),
        "drafted": counters.get("num_draft_tokens", 0),
        "accepted": counters.get("num_accepted_tokens", 0),
    }


def workload_result(found: Sequence[dict[str, Any]], config: WorkloadConfig) -> dict[str, Any]:
    """Return the JSON of `bench workload`: every request, each category, and all of them."""
    of = {name: [task for task in found if task["category"] == name] for name in CATEGORIES}
    return {
        **_summary(found),
        "categories": {name: _summary(tasks) for name, tasks in of.items() if tasks},
        "tasks": list(found),
        "config": asdict(config),
    }


def _summary(tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of the requests' speeds (as the Acti card has it), and what they took."""
    speeds = [task["decode_tok_s"] for task in tasks if task["decoded_tokens"]]
    drafted = sum(task["drafted"] for task in tasks)
    return {
        "decode_tok_s": mean(speeds) if speeds else None,
        "ttft_ms": median(task["ttft_ms"] for task in tasks),
        "acceptance": sum(task["accepted"] for task in tasks) / drafted if drafted else None,
        "requests": len(tasks),
        "completion_tokens": sum(task["completion_tokens"] for task in tasks),
        "cut_off": sum(task["finish_reason"] == "length" for task in tasks),
    }
