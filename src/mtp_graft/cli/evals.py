"""`mtp-graft bench gsm8k`, `humaneval`, `mmlu` and `capability`: how good the answers are."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mtp_graft.cli.app import JsonOption, SpeculativeOption, bench
from mtp_graft.cli.grouped import grouped
from mtp_graft.cli.help import QUALITY, SectionedCommand
from mtp_graft.cli.output import is_stdout, note, progress_bar, result_console, write_json
from mtp_graft.cli.target import RunOption, Target, keep_result

if TYPE_CHECKING:  # the imports of a command load torch: `--help` need not wait for it
    from mtp_graft.bench.evals.asking import ChatClient
    from mtp_graft.bench.evals.evaluation import Evaluation
    from mtp_graft.bench.evals.sandbox import Sandbox
    from mtp_graft.cli.output import Report

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Folder with gsm8k/, human_eval/, mmlu/. Default: the hub.",
    ),
]
SeedOption = Annotated[int, typer.Option(metavar="N", help="Draws the questions.")]
LimitOption = Annotated[int, typer.Option(min=1, metavar="N", help="How many questions.")]
MaxTokensOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Cap on an answer, thinking included.")
]
WithoutOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sandbox-without",
        metavar="LAYER",
        help="Give up a layer of the sandbox: namespaces, landlock, seccomp or limits.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """The options of how the questions are asked, and where the answers are kept."""

    thinking: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = False
    concurrency: Annotated[
        int, typer.Option(min=1, metavar="N", help="Questions asked at a time.")
    ] = 4
    num_speculative_tokens: SpeculativeOption = None
    run: RunOption = None
    json_file: JsonOption = None


@bench.command("gsm8k", cls=SectionedCommand, rich_help_panel=QUALITY)
@grouped
def bench_gsm8k(
    target: Target,
    asking: Asking,
    data_dir: DataOption = None,
    limit: LimitOption = 100,
    seed: SeedOption = 0,
    max_tokens: MaxTokensOption = 1024,
) -> None:
    """Ask GSM8K's word problems: greedy, step by step, exact match on `#### N`."""
    from mtp_graft.bench.evals.gsm8k import gsm8k

    _measure(gsm8k(data_dir, limit, seed, max_tokens), target, asking)


@bench.command("humaneval", cls=SectionedCommand, rich_help_panel=QUALITY)
@grouped
def bench_humaneval(
    target: Target,
    asking: Asking,
    data_dir: DataOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many. Default: all 164.")
    ] = None,
    seed: SeedOption = 0,
    max_tokens: MaxTokensOption = 1024,
    test_timeout_s: Annotated[
        float, typer.Option(min=1.0, metavar="S", help="Seconds that a problem's tests may take.")
    ] = 60.0,
    without: WithoutOption = None,
) -> None:
    """Ask HumanEval's functions: pass@1, greedy, with their unit tests in a sandbox."""
    from mtp_graft.bench.evals.humaneval import humaneval

    sandbox = _sandbox(without, test_timeout_s)
    _measure(humaneval(data_dir, limit, seed, sandbox, max_tokens), target, asking)


@bench.command("mmlu", cls=SectionedCommand, rich_help_panel=QUALITY)
@grouped
def bench_mmlu(
    target: Target,
    asking: Asking,
    data_dir: DataOption = None,
    limit: LimitOption = 100,
    seed: SeedOption = 0,
    max_tokens: MaxTokensOption = 128,
) -> None:
    """Ask MMLU's four-way questions: greedy, all subjects alike, with room to reason."""
    from mtp_graft.bench.evals.mmlu import mmlu

    _measure(mmlu(data_dir, limit, seed, max_tokens), target, asking)


@bench.command("capability", cls=SectionedCommand, rich_help_panel=QUALITY)
@grouped
def bench_capability(
    target: Target,
    asking: Asking,
    max_tokens: MaxTokensOption = 2048,
    without: WithoutOption = None,
) -> None:
    """Ask fourteen small tasks of seven kinds, from arithmetic to tool calls."""
    from mtp_graft.bench.evals.capability import capability

    _measure(capability(_sandbox(without, 60.0), max_tokens), target, asking)


def _sandbox(without: list[str] | None, seconds: float) -> "Sandbox":
    from mtp_graft.bench.evals.sandbox import Sandbox

    if without:
        note(f"warning: generated code runs without {', '.join(without)}, as you asked")
    return Sandbox(frozenset(without or ()), seconds)


def _measure(evaluation: "Evaluation", target: Target, asking: Asking) -> None:
    """Ask, judge and print; answers that came are kept if a run folder is given."""
    from mtp_graft.bench.evals.asking import Unanswered
    from mtp_graft.bench.evals.evaluation import run_evaluation
    from mtp_graft.bench.ledger import open_ledger

    k = asking.num_speculative_tokens
    target.check_k(k)
    folder = target.folder(asking.run, evaluation.benchmark)
    claim = evaluation.claim() | {"thinking": asking.thinking, "k": k}
    claim |= {"concurrency": asking.concurrency, "server": target.identity()}
    with progress_bar() as report, open_ledger(folder, claim) as ledger:
        try:
            result = run_evaluation(
                evaluation,
                lambda: _chat_client(target, k, report),
                *(asking.thinking, asking.concurrency, ledger),
                *(target.retrying(), report),
            )
        except Unanswered as error:
            cure = (
                f"the answered ones are in {folder}: run the same command again to go on"
                if folder
                else "nothing was kept: give --run DIR to be able to go on"
            )
            raise Unanswered(f"{evaluation.benchmark}: {error}; {cure}") from error
        result["settings"] |= {"thinking": asking.thinking, "concurrency": asking.concurrency}
        result = keep_result(result, folder, target, ledger)
    write_json(result, asking.json_file)
    _print_result(result, asking.json_file)


@contextmanager
def _chat_client(target: Target, k: int | None, report: "Report") -> Iterator["ChatClient"]:
    from mtp_graft.bench.evals.asking import ChatClient

    with (
        target.client(report, "", k) as server,
        ChatClient(server.base_url, target.api_key, target.silence_s) as client,
    ):
        yield client


def _print_result(result: dict[str, Any], json_file: Path | None) -> None:
    low, high = result["interval"]
    table = Table("", "score", "95 % interval", "correct", "failures")
    kinds = ", ".join(f"{number} {kind}" for kind, number in result["kinds"].items())
    table.add_row(
        result["benchmark"],
        f"{100 * result['score']:.1f} %",
        f"{100 * low:.1f} % to {100 * high:.1f} %",
        f"{result['correct']} of {result['total']}",
        kinds or "-",
    )
    result_console(json_file).print(table)
    if result["retried"] and not is_stdout(json_file):
        counts = ", ".join(f"{number} {kind}" for kind, number in result["retried"].items())
        note(f"requests asked again: {counts}")
