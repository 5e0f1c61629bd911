"""`mtp-graft bench decode`, `sweep` and `workload`: how fast a server is."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mtp_graft.bench.page import number, percent, percents, spread
from mtp_graft.cli.app import SpeculativeOption, bench
from mtp_graft.cli.grouped import grouped
from mtp_graft.cli.help import SPEED, SectionedCommand
from mtp_graft.cli.output import progress_bar, result_console
from mtp_graft.cli.target import Target, check_url

if TYPE_CHECKING:  # the client need not be imported for `--help`
    from mtp_graft.serving.client import Prompt


def _count(text: str, least: int = 1) -> Any:
    return typer.Option(min=least, metavar="N", help=text)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """The options of `decode` and `sweep`: what is asked."""

    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='JSON Lines of {"id", "text"}. Default: the tiny model\'s.',
        ),
    ] = None
    limit: Annotated[int | None, _count("Use the first prompts only.")] = None
    max_tokens: Annotated[int, _count("Tokens to continue each prompt by.", 2)] = 128
    ignore_eos: Annotated[bool, typer.Option(help="Go on after an end-of-sequence token.")] = True
    temperature: Annotated[
        float,
        typer.Option(min=0.0, metavar="T", help="0 is greedy; above, texts are not compared."),
    ] = 0.0

    def prompts(self) -> "list[Prompt]":
        """Return the prompts of the file, or the tiny recipe's."""
        from mtp_graft.pipeline import find_bundled_recipe
        from mtp_graft.recipe import load_recipe
        from mtp_graft.stages.calibration import iterate_prompts

        bundled = load_recipe(find_bundled_recipe()).bench.prompts
        return list(islice(iterate_prompts(str(self.prompt_file or bundled)), self.limit))


@bench.command("decode", cls=SectionedCommand, rich_help_panel=SPEED)
@grouped
def bench_decode(
    target: Target,
    asking: Asking,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URL", help="Take turns with this checkpoint, or this running server."
        ),
    ] = None,
    pairs: Annotated[
        int, _count("How often they take turns; even, to go first equally often.", 2)
    ] = 6,
    rounds: Annotated[int, _count("How often every prompt is continued, in each turn.")] = 3,
    k: SpeculativeOption = None,
) -> None:
    """Measure the decode speed of one request at a time, time to first token and acceptance.

    With --against, both servers take turns (base, MTP, MTP, base, ...) and the ratio of their
    speeds comes with an interval.
    """
    from mtp_graft.bench.decode import DecodeConfig, decode_result, measure_alternating, serve_turn
    from mtp_graft.bench.requests import measured

    other = None if against is None else _other(target, against)
    config = DecodeConfig(asking.max_tokens, rounds, asking.ignore_eos, asking.temperature)
    prompts, k = asking.prompts(), target.num_drafts(k)

    def measure(folder: Path | None) -> dict[str, Any]:
        with progress_bar() as report:
            ours = partial(target.client, report, k=k)
            if other is None:
                turn = partial(serve_turn, ours, prompts, config, report)
                return decode_result([measured(folder, "decode", turn)], config)
            serve = {"mtp": ours, "base": partial(other.client, report, k=0)}
            return measure_alternating(serve, prompts, pairs, config, report, folder)

    # More pairs may be added to a folder later: each stands by itself.
    claim = {"decode": asdict(config), "k": k, "prompts": _hash(prompts)}
    claim |= {"against": other.identity()} if other else {}
    _print_decode(target, target.finish("decode", claim, measure))


def _other(target: Target, against: str) -> Target:
    """Return the server to compare with; it is ours if the first one is."""
    is_url = "://" in against
    if is_url == (target.base_url is None):
        raise typer.BadParameter(
            "compare a --checkpoint with a checkpoint, and a --base-url with an address"
        )
    if is_url:
        return replace(target, base_url=check_url(against))
    return replace(target, checkpoint=Path(against))


def _hash(prompts: Sequence[Any]) -> str:
    """Return what tells these prompts from others."""
    return sha256(repr(prompts).encode()).hexdigest()


def _print_table(target: Target, columns: Mapping[str, str], rows: Mapping[str, Any]) -> None:
    """Print a row for each result, its name first; `columns` has the headings by key."""
    table = Table("", *columns.values())
    for name, found in rows.items():
        table.add_row(name, *(_cell(key, found[key]) for key in columns))
    result_console(target.json_file).print(table)


def _cell(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return spread(value, 100, " %") if key == "acceptance" else spread(value)
    if isinstance(value, list):
        return percents(value)
    if key == "acceptance":
        return percent(value)
    return str(value) if isinstance(value, int) else number(value)


def _print_decode(target: Target, result: dict[str, Any]) -> None:
    columns = {"decode_tok_s": "decode tok/s", "ttft_ms": "TTFT ms", "tpot_ms": "ms per token"}
    sides = {"against": result["against"]} if "against" in result else {}
    _print_table(target, columns | {"acceptance": "acceptance"}, {**sides, "decode": result})
    lines = drafting_lines(result)
    if "ratio" in result:
        ratio = result["ratio"]["decode_tok_s"]
        low, high = ratio["interval"]
        known = {True: "identical on every prompt", None: "not compared, since texts are sampled"}
        differs = f"differs on {len(result['divergences'] or ())} prompts, or between rounds"
        lines = [
            f"decode speed: {ratio['estimate']:.3f} times the other's (95 % interval {low:.3f} to "
            f"{high:.3f}; {ratio['pairs']} pairs, {ratio['prompts']} prompts)",
            f"greedy text: {known.get(result['greedy_identical'], differs)}",
            *lines,
        ]
    for line in lines:
        result_console(target.json_file).print(line, soft_wrap=True)


def drafting_lines(result: dict[str, Any]) -> list[str]:
    """Return how many drafts were accepted at each position, if there were any."""
    if result["acceptance_length"] is None:
        return []
    ended = ", after the end of a text too" if result.get("config", {}).get("ignore_eos") else ""
    return [
        f"k = {result['k']}: accepted by position {percents(result['acceptance_by_position'])} "
        f"(each given the ones before{ended}), {result['acceptance_length']:.2f} tokens a step"
    ]


@bench.command("sweep", cls=SectionedCommand, rich_help_panel=SPEED)
@grouped
def bench_sweep(
    target: Target,
    asking: Asking,
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of requests at a time.")
    ] = "1,2,3,4,6,8",
    k: Annotated[
        str | None,
        typer.Option(
            *("--k", "-k"),
            metavar="N,N,...",
            help="Numbers of tokens to draft a step, one server each; 0 leaves the head out. "
            "Default: 3 on GPUs, 1 on a CPU.",
        ),
    ] = None,
    requests: Annotated[int, _count("Requests of a point, times its concurrency.")] = 4,
) -> None:
    """Measure speed with several requests at a time, by `vllm bench serve`."""
    from mtp_graft.bench.decode import DecodeConfig
    from mtp_graft.bench.sweep import measure_sweep

    given: Sequence[int | None] = [None] if k is None else _numbers("--k", k, 0)
    loads, ks = _numbers("--concurrency", concurrency, 1), [*map(target.num_drafts, given)]
    prompts = asking.prompts()
    config = DecodeConfig(asking.max_tokens, requests, asking.ignore_eos, asking.temperature)

    def measure(folder: Path | None) -> dict[str, Any]:
        with progress_bar() as report:
            return measure_sweep(
                lambda drafts: target.client(report, f"k{drafts}", drafts),
                *(prompts, ks, loads, config, report, folder, target.api_key),
            )

    # More loads or another k may be added to a folder later: each point stands by itself.
    claim = {"sweep": asdict(config), "prompts": _hash(prompts)}
    points = target.finish("sweep", claim, measure)["points"]
    columns = {
        "per_stream_tok_s": "tok/s a request",
        "aggregate_tok_s": "tok/s in all",
        "ttft_ms": "TTFT ms",
        "acceptance_by_position": "accepted by position",
        "errors": "errors",
    }
    rows = {f"k = {point['k']}, {point['concurrency']} at a time": point for point in points}
    _print_table(target, columns, rows)


def _numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    """Return the numbers of a list such as 1,2,4."""
    try:
        numbers = tuple(map(int, text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < least or len(set(numbers)) < len(numbers):
        raise typer.BadParameter(
            f"{option} is {text!r}, expected different numbers from {least} on, as in 1,2,3"
        )
    return numbers


@bench.command("workload", cls=SectionedCommand, rich_help_panel=SPEED)
@grouped
def bench_workload(
    target: Target,
    thinking: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = False,
    max_tokens: Annotated[
        int | None, _count("Cap on an answer. Default: the context's end.", 2)
    ] = None,
    k: SpeculativeOption = None,
) -> None:
    """Measure speed on fifteen everyday requests with a system prompt and tools."""
    from mtp_graft.bench.workload import load_workload, measure_workload

    requests, k = load_workload(thinking, max_tokens), target.num_drafts(k)

    def measure(folder: Path | None) -> dict[str, Any]:
        with progress_bar() as report, ExitStack() as stack:
            client = target.client(report, "workload", k)
            return measure_workload(lambda: stack.enter_context(client), requests, report, folder)

    claim = {"thinking": thinking, "max_tokens": max_tokens, "k": k, "prompts": _hash(requests)}
    result = target.finish("workload", claim, measure)
    columns = {
        "requests": "requests",
        "completion_tokens": "tokens",
        "decode_tok_s": "tok/s (mean)",
        "ttft_ms": "TTFT ms",
        "acceptance": "acceptance",
        "cut_off": "cut off",
    }
    _print_table(target, columns, {**result["categories"], "all": result})
