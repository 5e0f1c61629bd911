"""Run a task with Inspect against an OpenAI endpoint; a killed run goes on from its log."""

import hashlib
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval_set
from inspect_ai.log import EvalSample, read_eval_log
from inspect_ai.model import GenerateConfig, Model, get_model, modelapi
from inspect_ai.model._openai import OpenAIResponseError
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI
from openai import OpenAI, OpenAIError
from tenacity import wait_fixed

from mtp_graft.bench.evals.capability import capability
from mtp_graft.bench.evals.tasks import gsm8k, humaneval, mmlu
from mtp_graft.dsv4.acceptance import wilson_interval
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import READ_ERRORS

_WHOLE = (None, "stop", "length", "tool_calls")  # not every server gives a reason
#: Benchmark -> its task on a data folder (None: the hub), limit, seed and a timeout for tests.
TASKS = {"gsm8k": gsm8k, "humaneval": humaneval, "mmlu": mmlu, "capability": capability}


class _ChatAPI(OpenAICompatibleAPI):
    """Asks again, a second later, for an answer that is not whole or not readable."""

    silence_s = 300.0  # not an argument: those tell one log from another

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, client_timeout=self.silence_s, **options)

    def on_response(self, response: dict[str, Any]) -> None:
        try:
            [choice] = response["choices"]
            said = map(choice["message"].get, ("content", "reasoning", "reasoning_content"))
            is_text = all(text is None or isinstance(text, str) for text in said)
            is_whole = choice["finish_reason"] in _WHOLE and is_text
        except READ_ERRORS:
            is_whole = False
        if not is_whole:  # to Inspect, a failure of the server that may pass
            raise OpenAIResponseError("server_error", f"no whole answer: {str(response)[:300]}")

    def retry_wait(self) -> wait_fixed:
        return wait_fixed(1.0)


@modelapi(name="mtp-graft")
def _chat_api() -> type[_ChatAPI]:
    return _ChatAPI


def questions_digest(task: Task) -> str:
    """Return a hash of a task's questions."""
    asked = [sample.model_dump_json(include={"id", "input"}) for sample in task.dataset]
    return hashlib.sha256("\n".join(asked).encode()).hexdigest()


def run_task(
    task: Task, log_dir: Path, model: Model, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Ask what the log folder does not have; return the benchmark's JSON.

    Raises GraftError if questions brought no answer: there is no score then.
    """
    concurrency = settings["concurrency"]
    with redirect_stdout(sys.stderr):
        _, [header] = eval_set(
            task,
            str(log_dir),
            model=model,
            retry_attempts=0,
            retry_immediate=False,
            continue_on_fail=True,  # ask the others, then fail
            max_samples=concurrency,
            max_connections=concurrency,
            log_buffer=1,  # a killed run loses what was in work
            log_realtime=False,
            log_level="error",
            ctl_server=False,
            display="rich" if sys.stderr.isatty() else "plain",
        )
    samples = read_eval_log(header.location).samples or []
    answered = [sample for sample in samples if not sample.error]
    if len(answered) < len(task.dataset):
        reasons = [sample.error.message for sample in samples if sample.error]
        reasons = [reason for reason in reasons if "not asked" not in reason] or ["not asked"]
        left = f"{len(task.dataset) - len(answered)} of {len(task.dataset)} questions left"
        raise GraftError(f"{task.name}: {left}: {reasons[0]}; with --run, run it again to go on")
    return _result(task.name, answered) | {"settings": dict(settings)}


def find_model(
    base_url: str, api_key: str | None, silence_s: float, attempts: int, settings: Mapping[str, Any]
) -> Model:
    """Return the model that a server has, to be asked greedily. Raises GraftError if it has none.

    A request has failed after `silence_s` without a byte, and for good after `attempts`.
    """
    where = {"base_url": f"{base_url}/v1", "api_key": api_key or "none"}
    try:
        name = OpenAI(**where, timeout=silence_s).models.list().data[0].id
    except (OpenAIError, *READ_ERRORS) as error:
        raise GraftError(f"{base_url}: names no model at /v1/models ({error})") from error
    config = GenerateConfig(
        temperature=0.0,
        max_tokens=settings["max_tokens"],
        max_retries=attempts - 1,
        extra_body={"chat_template_kwargs": {"thinking": settings["thinking"]}},
    )
    _ChatAPI.silence_s = silence_s
    ours = {"service": "mtp-graft", "stream": False, "max_retries": 0}  # those of the SDK
    return get_model(f"mtp-graft/{name}", config=config, memoize=False, **where, **ours)


def _result(name: str, samples: list[EvalSample]) -> dict[str, Any]:
    failures = []
    categories: dict[str, dict[str, int]] = {}
    for sample in samples:
        [score] = (sample.scores or {}).values()
        if "category" in sample.metadata:
            of = categories.setdefault(sample.metadata["category"], {"correct": 0, "total": 0})
            of["total"] += 1
            of["correct"] += score.value == "C"
        if score.value != "C":
            kind = (score.metadata or {})["kind"]
            failures.append({"id": sample.id, "kind": kind, "detail": score.explanation})
    correct = len(samples) - len(failures)
    retries = sum(getattr(event, "retries", 0) or 0 for s in samples for event in s.events)
    return {
        "benchmark": name,
        "score": correct / len(samples),
        "correct": correct,
        "total": len(samples),
        "interval": list(wilson_interval(correct, len(samples))),
        "failures": failures,
        "kinds": dict(Counter(failure["kind"] for failure in failures)),
        "categories": categories,
        "retried": {"request": retries} if retries else {},
        "seconds": _busy_seconds(samples),
    }


def _busy_seconds(samples: list[EvalSample]) -> float:
    """Return the seconds in which a sample was at work, those of earlier sessions included."""
    seconds = end = 0.0
    for span in sorted((str(sample.started_at), str(sample.completed_at)) for sample in samples):
        started, completed = (datetime.fromisoformat(time).timestamp() for time in span)
        seconds += max(0.0, completed - max(started, end))
        end = max(end, completed)
    return seconds
