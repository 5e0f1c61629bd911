"""`mtp-graft bench gsm8k`, `humaneval`, `mmlu` and `capability`: how good the answers are."""

import importlib.util
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from mtp_graft.cli.app import bench, with_options
from mtp_graft.cli.output import progress_bar, show, table
from mtp_graft.cli.target import Target
from mtp_graft.errors import GraftError
from mtp_graft.serving.command import NUM_SPECULATIVE_TOKENS, option


@dataclass(frozen=True, kw_only=True)
class Asking:
    """The options that all four have."""

    data_dir: Path | None = option(None, "DIR", "Has gsm8k/, human_eval/, mmlu/. Default: the hub.")
    seed: int = option(0, "N", "Draws the questions.")
    thinking: bool = option(False, None, "Let the model think before it answers.")
    concurrency: int = option(4, "N", "Questions asked at a time.", min=1)
    num_speculative_tokens: int | None = NUM_SPECULATIVE_TOKENS


def _add_command(name: str, num_questions: int | None, num_tokens: int, purpose: str) -> None:
    how_many = f"How many questions. Default: {num_questions or 'all'}."

    @bench.command(name, help=purpose)
    @with_options
    def command(
        target: Target,
        asking: Asking,
        limit: int | None = option(num_questions, "N", how_many, min=1, show_default=False),
        max_tokens: int = option(num_tokens, "N", "Cap on an answer, thinking included.", min=1),
    ) -> None:
        settings = asdict(asking) | {"limit": limit, "max_tokens": max_tokens}
        result = _evaluate(name, target, settings)
        columns = ("benchmark", "score", "interval", "correct", "total", "kinds")
        show(result, target.json_file, table([result], *columns))


_add_command("gsm8k", 100, 1024, "Ask GSM8K's word problems: greedy, exact match on `#### N`.")
_add_command("humaneval", None, 1024, "Ask HumanEval's functions: greedy, pass@1, unit tests.")
_add_command("mmlu", 100, 128, "Ask MMLU's four-way questions: greedy, all subjects alike.")
_add_command("capability", None, 2048, "Ask fourteen small tasks, from arithmetic to tool calls.")


def _evaluate(name: str, target: Target, settings: dict[str, Any]) -> dict[str, Any]:
    """Ask and judge; a finished result is given again."""
    if importlib.util.find_spec("inspect_ai") is None:
        raise GraftError(
            f"bench {name} needs Inspect: pip install 'mtp-graft[evals]', or in a checkout "
            ".venv/bin/pip install -e '.[evals]'"
        )
    from mtp_graft.bench.evals.run import TASKS, find_model, run_task
    from mtp_graft.bench.requests import measured

    k, data_dir = settings.pop("num_speculative_tokens"), settings.pop("data_dir")
    if target.checkpoint or k is not None:  # a running server need not be vLLM
        k = target.num_drafts(k)
    task = TASKS[name](data_dir, settings["limit"], settings["seed"])
    # Files may change in the same folder; messages have an id that is new in every process.
    questions = [(s.id, s.input if isinstance(s.input, str) else None) for s in task.dataset]
    claim = {**settings, "k": k, "questions": sha256(repr(questions).encode()).hexdigest()}

    def ask(logs: Path) -> dict[str, Any]:
        with ExitStack() as stack:
            with progress_bar() as report:
                server = stack.enter_context(target.client(report, name, k))
            return run_task(task, logs, find_model(server, settings))

    def measure(folder: Path) -> dict[str, Any]:
        return measured(folder, "result", lambda: ask(folder / "logs") | {"settings": settings})

    return target.finish(name, claim, measure)
