"""Run a task with Inspect against an OpenAI endpoint; a killed run goes on from its log."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval_set
from inspect_ai.log import EvalSample, read_eval_log
from inspect_ai.model import GenerateConfig, Model, get_model, modelapi
from inspect_ai.model._openai import OpenAIResponseError
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI
from inspect_ai.scorer import CORRECT
from openai import OpenAI, OpenAIError

from mtp_graft.bench.evals.capability import capability
from mtp_graft.bench.evals.tasks import SOURCES, load_task
from mtp_graft.errors import GraftError, translated
from mtp_graft.serving.client import READ_ERRORS, ServerClient
from mtp_graft.serving.metrics import wilson_interval

#: Benchmark -> its task on a data folder (None: the hub), limit and seed.
TASKS: dict[str, Callable[..., Task]] = {name: partial(load_task, name) for name in SOURCES}
TASKS["capability"] = capability
_WHOLE = (None, "stop", "length", "tool_calls")  # not every server gives a reason
#: Seconds without a byte after which a request has failed; how often one is asked in all.
_SILENCE_S, _ATTEMPTS = 300.0, 3


@modelapi(name="mtp-graft")
class _ChatAPI(OpenAICompatibleAPI):
    """Asks again for an answer that is not whole or not readable."""

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


def find_model(server: ServerClient, settings: Mapping[str, Any]) -> Model:
    """Return the model that a server has, to be asked greedily; GraftError if it has none."""
    where = {"base_url": f"{server.base_url}/v1", "api_key": server.api_key or "none"}
    what = f"{server.base_url}: names no model at /v1/models"
    with translated(what, OpenAIError, *READ_ERRORS):
        name = OpenAI(**where, timeout=_SILENCE_S).models.list().data[0].id
    config = GenerateConfig(
        temperature=0.0,
        max_tokens=settings["max_tokens"],
        max_retries=_ATTEMPTS - 1,
        max_connections=settings["concurrency"],
        extra_body={"chat_template_kwargs": {"thinking": settings["thinking"]}},
    )
    options = {"service": "mtp-graft", "stream": False, "client_timeout": _SILENCE_S}
    options["max_retries"] = 0  # of the SDK
    return get_model(f"mtp-graft/{name}", config=config, memoize=False, **where, **options)


def run_task(task: Task, log_dir: Path, model: Model) -> dict[str, Any]:
    """Ask what the log folder does not have; return the JSON, or GraftError without an answer."""
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):
        _, [header] = eval_set(
            task,
            str(log_dir),
            model=model,
            retry_attempts=0,
            retry_immediate=False,
            max_samples=model.config.max_connections,
            log_buffer=1,  # a killed run loses what was in work
            log_realtime=False,
            log_level="error",
            ctl_server=False,
            display="rich" if sys.stderr.isatty() else "plain",
        )
    samples = read_eval_log(header.location).samples or []
    answered = [sample for sample in samples if not sample.error]
    if len(answered) < len(task.dataset):
        left = f"{len(task.dataset) - len(answered)} of {len(task.dataset)} questions left"
        why = header.error.message if header.error else header.status
        raise GraftError(f"{task.name}: {left}: {why}; with --run, run it again to go on")
    return {**_result(task.name, answered), "seconds": time.perf_counter() - started}


def _result(name: str, samples: list[EvalSample]) -> dict[str, Any]:
    failures, right, asked = [], Counter[str](), Counter[str]()
    for sample in samples:
        [score] = (sample.scores or {}).values()
        category = sample.metadata.get("category", "")
        asked[category] += 1
        if score.value == CORRECT:
            right[category] += 1
        else:
            kind = (score.metadata or {})["kind"]
            failures.append({"id": sample.id, "kind": kind, "detail": score.explanation})
    correct = right.total()
    return {
        "benchmark": name,
        "score": correct / len(samples),
        "correct": correct,
        "total": len(samples),
        "interval": list(wilson_interval(correct, len(samples))),
        "failures": failures,
        "kinds": dict(Counter(failure["kind"] for failure in failures)),
        "categories": {c: {"correct": right[c], "total": asked[c]} for c in asked if c},
    }
