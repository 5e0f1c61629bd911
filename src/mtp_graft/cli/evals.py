"""`mtp-graft bench gsm8k`, `humaneval`, `mmlu` and `capability`: how good the answers are."""

import importlib.util
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mtp_graft.cli.app import JsonOption, SpeculativeOption, bench
from mtp_graft.cli.grouped import grouped
from mtp_graft.cli.help import QUALITY, SectionedCommand
from mtp_graft.cli.output import progress_bar, result_console, write_json
from mtp_graft.cli.target import RunOption, Target
from mtp_graft.errors import GraftError

if TYPE_CHECKING:  # the imports of a command load Inspect: `--help` need not wait for it
    from inspect_ai import Task


@dataclass(frozen=True, kw_only=True)
class Asking:
    """The options that all four have."""

    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Has gsm8k/, human_eval/, mmlu/. Default: the hub."),
    ] = None
    seed: Annotated[int, typer.Option(metavar="N", help="Draws the questions.")] = 0
    thinking: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = False
    concurrency: Annotated[
        int, typer.Option(min=1, metavar="N", help="Questions asked at a time.")
    ] = 4
    test_timeout_s: Annotated[
        float, typer.Option(min=1.0, metavar="S", help="Seconds that tests of code may take.")
    ] = 60.0
    num_speculative_tokens: SpeculativeOption = None
    run: RunOption = None
    json_file: JsonOption = None


def _add_command(name: str, num_questions: int | None, num_tokens: int, purpose: str) -> None:
    how_many = f"How many questions. Default: {num_questions or 'all'}."
    limit_option = typer.Option(min=1, metavar="N", help=how_many, show_default=False)
    token_option = typer.Option(min=1, metavar="N", help="Cap on an answer, thinking included.")

    @bench.command(name, help=purpose, cls=SectionedCommand, rich_help_panel=QUALITY)
    @grouped
    def command(
        target: Target,
        asking: Asking,
        limit: Annotated[int | None, limit_option] = num_questions,
        max_tokens: Annotated[int, token_option] = num_tokens,
    ) -> None:
        names = ("seed", "thinking", "concurrency", "test_timeout_s")
        settings = {key: getattr(asking, key) for key in names}
        settings |= {"limit": limit, "max_tokens": max_tokens}
        _print(_measure(name, settings, target, asking), asking.json_file)


_add_command("gsm8k", 100, 1024, "Ask GSM8K's word problems: greedy, exact match on `#### N`.")
_add_command("humaneval", None, 1024, "Ask HumanEval's functions: greedy, pass@1, unit tests.")
_add_command("mmlu", 100, 128, "Ask MMLU's four-way questions: greedy, all subjects alike.")
_add_command("capability", None, 2048, "Ask fourteen small tasks, from arithmetic to tool calls.")


def _measure(name: str, settings: dict[str, Any], target: Target, asking: Asking) -> dict[str, Any]:
    """Ask and judge. A run folder keeps what was answered, and gives a finished result again."""
    if importlib.util.find_spec("inspect_ai") is None:
        raise GraftError(
            f"bench {name} needs Inspect: pip install 'mtp-graft[evals]', or in a checkout "
            ".venv/bin/pip install -e '.[evals]'"
        )
    from mtp_graft.bench.evals.run import TASKS, questions_digest

    k = asking.num_speculative_tokens
    target.check_k(k)
    task = TASKS[name](asking.data_dir, settings["limit"], asking.seed, asking.test_timeout_s)
    folder = target.folder(asking.run, name)
    if folder is None:
        with tempfile.TemporaryDirectory() as logs:
            return _ask(task, Path(logs), settings, target, k)

    from mtp_graft.checkpoint.files import write_json as write_file
    from mtp_graft.checkpoint.manifest import claim_folder, finished_result, write_manifest
    from mtp_graft.pipeline.device import device_name

    started = time.monotonic()
    config = {"benchmark": name, **settings, "questions": questions_digest(task), "k": k}
    config["server"] = target.identity()
    if target.checkpoint is not None:  # what the default comes to
        config["k"] = target.num_drafts(k)
    claim_folder(folder, config)
    result = finished_result(folder, "result.json")
    if result is None:
        result = _ask(task, folder / "logs", settings, target, k)
        device = device_name() if target.checkpoint else f"server at {target.base_url}"
        seconds = time.monotonic() - started
        write_file(result, folder / "result.json")
        write_manifest(folder, f"bench {folder.name}", config, (), device, seconds)
    return result


def _ask(
    task: "Task", logs: Path, settings: dict[str, Any], target: Target, k: int | None
) -> dict[str, Any]:
    from mtp_graft.bench.evals.run import find_model, run_task

    with ExitStack() as stack:
        with progress_bar() as report:
            server = stack.enter_context(target.client(report, "", k))
        asked = (target.api_key, target.silence_s, target.attempts)
        return run_task(task, logs, find_model(server.base_url, *asked, settings), settings)


def _print(result: dict[str, Any], json_file: Path | None) -> None:
    write_json(result, json_file)
    low, high = (f"{100 * bound:.1f} %" for bound in result["interval"])
    score, correct = f"{100 * result['score']:.1f} %", f"{result['correct']} of {result['total']}"
    kinds = ", ".join(f"{number} {kind}" for kind, number in result["kinds"].items())
    table = Table("", "score", "95 % interval", "correct", "failures")
    table.add_row(result["benchmark"], score, f"{low} to {high}", correct, kinds or "-")
    result_console(json_file).print(table)
