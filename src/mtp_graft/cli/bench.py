"""`mtp-graft bench decode`, `sweep` and `workload`: how fast a server is."""

from collections.abc import Sequence
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
from mtp_graft.cli.app import JsonOption, SpeculativeOption, bench, grouped
from mtp_graft.cli.output import check_writable, note, progress_bar, result_console, write_json
from mtp_graft.cli.target import RunOption, Target, check_url, keep_result

if TYPE_CHECKING:  # the client need not be imported for `--help`
    from mtp_graft.serving.client import Prompt


@dataclass(frozen=True, kw_only=True)
class Asking:
    """The options of `decode` and `sweep`: what is asked, and where the answers' times go."""

    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='JSON Lines of {"id", "text"}. Default: the tiny model\'s.',
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use the first prompts only.")
    ] = None
    max_tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens to continue each prompt by.")
    ] = 128
    ignore_eos: Annotated[bool, typer.Option(help="Go on after an end-of-sequence token.")] = True
    temperature: Annotated[
        float,
        typer.Option(min=0.0, metavar="T", help="0 is greedy; above, texts are not compared."),
    ] = 0.0
    run: RunOption = None
    json_file: JsonOption = None

    def prompts(self) -> "list[Prompt]":
        """Return the prompts of the file, or the tiny recipe's."""
        from mtp_graft.pipeline import find_bundled_recipe
        from mtp_graft.recipe import load_recipe
        from mtp_graft.stages.calibration import iterate_prompts

        bundled = load_recipe(find_bundled_recipe()).bench.prompts
        return list(islice(iterate_prompts(str(self.prompt_file or bundled)), self.limit))


@bench.command("decode")
@grouped
def bench_decode(
    target: Target,
    asking: Asking,
    against: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Compare with this checkpoint, served in turn."),
    ] = None,
    against_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            callback=check_url,
            help="Compare with this running server, asked in turn.",
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="How often the two take turns; even, to go first equally often. Default: 6.",
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="How often every prompt is continued, in each turn."),
    ] = 3,
    k: SpeculativeOption = None,
) -> None:
    """Measure the decode speed of one request at a time, time to first token and acceptance.

    With --against, both servers take turns (base, MTP, MTP, base, ...) and the ratio of their
    speeds comes with an interval.
    """
    from mtp_graft.bench.alternating import measure_alternating, measure_decode
    from mtp_graft.bench.decode import DecodeConfig, decode_result

    target.check_k(k)
    other = _other(target, against, against_url)
    if pairs is not None and other is None:
        raise typer.BadParameter(
            "--pairs needs --against or --against-url: one server has no turns"
        )
    config = DecodeConfig(asking.max_tokens, rounds, asking.ignore_eos, asking.temperature)
    prompts, folder = asking.prompts(), target.folder(asking.run, "decode")
    k = target.num_drafts(k)
    # More pairs may be added to a folder later: each stands by itself.
    claim = {"decode": asdict(config), "k": k, "prompts": _hash(prompts)}
    claim |= {"against": other.identity()} if other else {}
    session = target.session(folder, claim)
    with progress_bar() as report:
        ours = partial(target.client, report, num_speculative_tokens=k)
        if other is None:
            measured = measure_decode(ours, prompts, config, report, session)
            result = decode_result(measured, config) | session.as_result()
        else:
            serve = {"mtp": ours, "base": partial(other.client, report, num_speculative_tokens=0)}
            result = measure_alternating(serve, prompts, pairs or 6, config, report, session)
            # Servers that are not ours were not started again between their turns.
            result |= {"restarted": target.checkpoint is not None}
    keep_result(result, folder, target)
    write_json(result, asking.json_file)
    _print_decode(result, asking.json_file)


def _other(target: Target, against: Path | None, against_url: str | None) -> Target | None:
    """Return the server to compare with, if any; it is ours if the first one is."""
    if against is None and against_url is None:
        return None
    given = (against is None, against_url is None)
    if given != (target.checkpoint is None, target.base_url is None):
        raise typer.BadParameter(
            "compare a --checkpoint with --against, or a --base-url with --against-url"
        )
    return replace(target, base_url=against_url, checkpoint=against)


def _hash(prompts: Sequence[Any]) -> str:
    """Return what tells these prompts from others."""
    return sha256(repr([asdict(one) for one in prompts]).encode()).hexdigest()


def _print_decode(result: dict[str, Any], json_file: Path | None) -> None:
    out = result_console(json_file)
    table = Table("", "decode tok/s", "TTFT ms", "ms per token", "acceptance")
    for name in ("against", "decode"):
        if found := result if name == "decode" else result.get(name):
            speeds = [spread(found[key]) for key in ("decode_tok_s", "ttft_ms", "tpot_ms")]
            acceptance = found["acceptance"] and found["acceptance"]["median"]
            table.add_row(name, *speeds, percent(acceptance))
    out.print(table)
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
        out.print(line, soft_wrap=True)


def drafting_lines(result: dict[str, Any]) -> list[str]:
    """Return how many drafts were accepted at each position, if there were any."""
    if result["acceptance_length"] is None:
        return []
    ended = ", after the end of a text too" if result.get("config", {}).get("ignore_eos") else ""
    return [
        f"k = {result['k']}: accepted by position {percents(result['acceptance_by_position'])} "
        f"(each given the ones before{ended}), {result['acceptance_length']:.2f} tokens a step"
    ]


@bench.command("sweep")
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
    requests: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Requests of a point, times its concurrency."),
    ] = 4,
    chart: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=check_writable,
            help="Draw the points here (PNG). Default: in the run folder.",
        ),
    ] = None,
) -> None:
    """Measure speed with several requests at a time, by `vllm bench serve`."""
    from mtp_graft.bench.charts import sweep_chart
    from mtp_graft.bench.sweep import SweepConfig, measure_sweep

    target.check_k(k)
    loads, ks = _numbers("--concurrency", concurrency, 1), k and _numbers("--k", k, 0)
    prompts, folder = asking.prompts(), target.folder(asking.run, "sweep")
    config = SweepConfig(
        *(loads, ks or (target.num_drafts(None),), asking.max_tokens, requests),
        *(asking.ignore_eos, asking.temperature),
    )
    # More loads or another k may be added to a folder later: each point stands by itself.
    claim = asdict(config) | {"concurrencies": None, "ks": None, "prompts": _hash(prompts)}
    session = target.session(folder, claim)
    with progress_bar() as report:
        result = measure_sweep(
            lambda drafts: target.client(report, f"k{drafts}", drafts),
            *(prompts, config, report, session, target.api_key),
        )
    keep_result(result, folder, target)
    write_json(result, asking.json_file)
    result_console(asking.json_file).print(_sweep_table(result["points"]))
    if picture := chart or (folder and folder / "sweep.png"):
        picture.write_bytes(sweep_chart(result["points"]))
        note(f"chart: {picture}")


def _numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    """Return the numbers of a list such as 1,2,4."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < least or len(set(numbers)) < len(numbers):
        raise typer.BadParameter(
            f"{option} is {text!r}, expected different numbers from {least} on, as in 1,2,3"
        )
    return numbers


def _sweep_table(points: Sequence[dict[str, Any]]) -> Table:
    columns = ("k", "concurrency", "tok/s a request", "tok/s in all", "TTFT ms")
    table = Table(*columns, "accepted by position", "errors")
    for point in points:
        speeds = [number(point[f"{of}_tok_s"]) for of in ("per_stream", "aggregate")]
        table.add_row(
            *(str(point["k"]), str(point["concurrency"]), *speeds, number(point["ttft_ms"])),
            *(percents(point["acceptance_by_position"]), str(point["errors"])),
        )
    return table


@bench.command("workload")
@grouped
def bench_workload(
    target: Target,
    thinking: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Cap on an answer. Default: the context's end."),
    ] = None,
    k: SpeculativeOption = None,
    run: RunOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure speed on fifteen everyday requests with a system prompt and tools."""
    from mtp_graft.bench.workload import WorkloadConfig, load_workload, measure_workload

    target.check_k(k)
    config, workload = WorkloadConfig(thinking, max_tokens), load_workload()
    folder, k = target.folder(run, "workload"), target.num_drafts(k)
    claim = asdict(config) | {"k": k, "prompts": _hash([workload])}
    session = target.session(folder, claim)
    with progress_bar() as report, ExitStack() as stack:
        result = measure_workload(
            lambda: stack.enter_context(target.client(report, "", k)),
            *(workload, config, report, session),
        )
    keep_result(result, folder, target)
    write_json(result, json_file)
    table = Table("", "requests", "tokens", "tok/s (mean)", "TTFT ms", "acceptance", "cut off")
    for name, found in [*result["categories"].items(), ("all", result)]:
        speeds = [number(found[key]) for key in ("decode_tok_s", "ttft_ms")]
        table.add_row(
            *(name, str(found["requests"]), str(found["completion_tokens"]), *speeds),
            *(percent(found["acceptance"]), str(found["cut_off"])),
        )
    result_console(json_file).print(table)
