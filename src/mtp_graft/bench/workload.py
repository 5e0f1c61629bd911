"""Fifteen requests as people make them: chats with a system prompt and tools, no token cap."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from statistics import mean, median
from typing import Any

from mtp_graft.bench.decode import Report
from mtp_graft.bench.ledger import Ledger
from mtp_graft.bench.streams import BenchClient, ChatAnswer, Retrying
from mtp_graft.serving.metrics import SpecDecodeCounters

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
    documents: Mapping[str, list[str]] = found["documents"]
    tasks = []
    for task in found["tasks"]:
        parts = (
            [*documents[task["document"]], task["text"]] if "document" in task else [task["text"]]
        )
        tasks.append(Task(task["id"], task["category"], "\n\n".join(parts)))
    return Workload(found["system"], tuple(found["tools"]), tuple(tasks))


def measure_workload(
    client: Callable[[], BenchClient],
    workload: Workload,
    config: WorkloadConfig,
    report: Report,
    ledger: Ledger,
    retrying: Retrying,
) -> dict[str, Any]:
    """Ask every request of the workload, one at a time, greedily; return speeds and acceptance.

    `client` is called only if something is left to ask: what the ledger has is not asked again.
    The first request is preceded by a short one as warm-up. Raises GraftError if a request fails
    for good.
    """
    missing = [task for task in workload.tasks if task.id not in ledger]
    if missing:
        server = client()
        report("workload: warm-up", 0, 0)
        warm_up = _body(workload, missing[0], config) | {"max_tokens": 8}
        retrying.ask("warm-up", partial(server.stream_chat, warm_up))
    total = len(workload.tasks)
    for done, task in enumerate(missing, start=total - len(missing)):
        report(f"workload: {task.id}", done, total)
        body = _body(workload, task, config)
        answer, counters = retrying.ask(task.id, partial(_ask, server, body))
        ledger.add(task.id, {"category": task.category} | _measured(answer, counters))
    report("workload", total, total)
    found = [{"id": task.id} | ledger[task.id] for task in workload.tasks]
    return workload_result(found, config) | retrying.as_dict()


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


def _ask(
    client: BenchClient, body: Mapping[str, Any]
) -> tuple[ChatAnswer, SpecDecodeCounters | None]:
    before = client.spec_decode_counters()
    answer = client.stream_chat(body)
    after = client.spec_decode_counters()
    return answer, None if before is None or after is None else after - before


def _measured(answer: ChatAnswer, counters: SpecDecodeCounters | None) -> dict[str, Any]:
    """Return a request's JSON; an answer in one chunk has no decode speed."""
    done = answer.completion
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": len(done.token_ids),
        "decoded_tokens": done.num_decoded,
        "decode_s": done.decode_s,
        "decode_tok_s": done.num_decoded / done.decode_s if done.num_decoded else None,
        "ttft_ms": 1e3 * done.ttft_s,
        "drafted": counters and counters.num_draft_tokens,
        "accepted": counters and counters.num_accepted_tokens,
        "finish_reason": done.finish_reason,
        "tool_calls": answer.num_tool_calls,
        "reasoning_chars": answer.num_reasoning_chars,
        "content_chars": answer.num_content_chars,
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
    """Return the mean of the requests' speeds (as the Acti card has it), and the pooled one."""
    decoded = [task for task in tasks if task["decode_tok_s"] is not None]
    drafted = sum(task["drafted"] or 0 for task in tasks)
    return {
        "decode_tok_s": mean(task["decode_tok_s"] for task in decoded) if decoded else None,
        "pooled_tok_s": (
            sum(task["decoded_tokens"] for task in decoded) / sum(t["decode_s"] for t in decoded)
            if decoded
            else None
        ),
        "ttft_ms": median(task["ttft_ms"] for task in tasks),
        "acceptance": sum(task["accepted"] or 0 for task in tasks) / drafted if drafted else None,
        "requests": len(tasks),
        "completion_tokens": sum(task["completion_tokens"] for task in tasks),
        "cut_off": sum(task["finish_reason"] == "length" for task in tasks),
    }
