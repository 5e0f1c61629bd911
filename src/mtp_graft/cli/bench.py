"""`mtp-graft bench decode`, `sweep` and `workload`: how fast a server is."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtp_graft.cli.app import JsonOption, SpeculativeOption, bench
from mtp_graft.cli.bench_tables import (
    decode_table,
    drafting_lines,
    ratio_lines,
    sweep_lines,
    sweep_table,
    workload_table,
)
from mtp_graft.cli.grouped import grouped
from mtp_graft.cli.help import SPEED, SectionedCommand
from mtp_graft.cli.output import (
    Report,
    check_writable,
    note,
    progress_bar,
    result_console,
    write_json,
)
from mtp_graft.cli.target import (
    IgnoreEosOption,
    LimitOption,
    PromptsOption,
    RunOption,
    Target,
    TemperatureOption,
    check_url,
    keep_result,
    prompts_of,
)

if TYPE_CHECKING:  # the imports of a command load torch: `--help` need not wait for it
    from mtp_graft.bench.decode import DecodeConfig
    from mtp_graft.bench.streams import BenchClient, Retrying

MaxTokensOption = Annotated[
    int, typer.Option(min=2, metavar="N", help="Tokens to continue each prompt by.")
]


@bench.command("decode", cls=SectionedCommand, rich_help_panel=SPEED)
@grouped
def bench_decode(
    target: Target,
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
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    max_tokens: MaxTokensOption = 128,
    rounds: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="How often every prompt is continued, in each turn."),
    ] = 3,
    ignore_eos: IgnoreEosOption = True,
    temperature: TemperatureOption = 0.0,
    k: SpeculativeOption = None,
    run: RunOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure single-stream decode speed, time to first token and acceptance by position.

    With --against, both servers take turns (base, MTP, MTP, base, ...) and the ratio of their
    speeds comes with an interval.
    """
    from mtp_graft.bench.decode import DecodeConfig

    target.check_k(k)
    other = _other(target, against, against_url)
    if pairs is not None and other is None:
        raise typer.BadParameter(
            "--pairs needs --against or --against-url: one server has no turns"
        )
    config = DecodeConfig(max_tokens, rounds, ignore_eos, temperature)
    folder = target.folder(run, "decode")
    asked = prompts_of(prompts, limit)
    decode = _Decode(target, k, asked, config, folder, target.retrying())
    with progress_bar() as report:
        result = decode.alone(report) if other is None else decode.beside(other, pairs or 6, report)
    write_json(result, json_file)
    out = result_console(json_file)
    if other is None:
        out.print(decode_table({"decode": result}))
    else:
        out.print(decode_table({"against": result["against"], "decode": result}))
        for line in ratio_lines(result):
            out.print(line, soft_wrap=True)
    for line in drafting_lines(result):
        out.print(line, soft_wrap=True)


def _other(target: Target, against: Path | None, against_url: str | None) -> Target | None:
    """Return the server to compare with, if any; it is ours if the first one is."""
    if against is None and against_url is None:
        return None
    given = (against is None, against_url is None)
    if given != (target.checkpoint is None, target.base_url is None):
        raise typer.BadParameter(
            "compare a --checkpoint with --against, or a --base-url with --against-url"
        )
    return replace(
        target,
        base_url=against_url,
        checkpoint=against,
        draft_sample_method=None,
        draft_lm_head_quantization=None,
    )


@dataclass(frozen=True)
class _Decode:
    """One `bench decode`: of a server alone, or in turns with another."""

    target: Target
    k: int | None
    prompts: Sequence[Any]
    config: "DecodeConfig"
    folder: Path | None
    retrying: "Retrying"

    def alone(self, report: Report) -> dict[str, Any]:
        from mtp_graft.bench.decode import decode_result, measure_kept
        from mtp_graft.bench.ledger import open_ledger

        servers = {"server": self.target.identity(), "k": self.k}
        claim = {"decode": asdict(self.config)} | servers | _named(self.prompts)
        with open_ledger(self.folder, claim) as ledger, ExitStack() as stack:
            rounds = measure_kept(
                lambda: stack.enter_context(self.target.client(report, "", self.k)),
                *(self.prompts, self.config, report, ledger, self.retrying),
            )
            result = decode_result(rounds, self.config) | self.retrying.as_dict()
            return keep_result(result, self.folder, self.target, ledger)

    def beside(self, other: Target, pairs: int, report: Report) -> dict[str, Any]:
        from mtp_graft.bench.alternating import AlternatingConfig, measure_alternating
        from mtp_graft.bench.ledger import open_ledger

        servers = {"server": self.target.identity(), "against": other.identity(), "k": self.k}
        alternating = AlternatingConfig(pairs, self.config)
        # More pairs may be added to a folder later: each stands by itself.
        claim = {"decode": asdict(self.config)} | servers | _named(self.prompts)
        with open_ledger(self.folder, claim) as ledger:
            result = measure_alternating(
                lambda name: self.target.client(report, name, self.k),
                lambda name: other.client(report, name, 0),
                *(self.prompts, alternating, report, ledger, self.retrying),
            )
            # Servers that are not ours were not started again between their turns.
            result |= {"restarted": self.target.checkpoint is not None}
            return keep_result(result, self.folder, self.target, ledger)


def _named(prompts: Sequence[Any]) -> dict[str, Any]:
    """Return what tells these prompts from others."""
    from hashlib import sha256

    asked = repr([asdict(prompt) for prompt in prompts])
    return {"prompts": sha256(asked.encode()).hexdigest()}


@bench.command("sweep", cls=SectionedCommand, rich_help_panel=SPEED)
@grouped
def bench_sweep(
    target: Target,
    streams: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of streams at a time, odd ones too.")
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
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    max_tokens: MaxTokensOption = 128,
    requests: Annotated[
        int, typer.Option(min=1, metavar="N", help="Measured requests a stream, at each point.")
    ] = 4,
    ignore_eos: IgnoreEosOption = True,
    temperature: TemperatureOption = 0.0,
    run: RunOption = None,
    chart: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=check_writable,
            help="Draw the points here (PNG). Default: in the run folder.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure speed with several streams at a time, for one or more numbers of drafted tokens."""
    from mtp_graft.bench.ledger import open_ledger
    from mtp_graft.bench.sweep import SweepConfig, measure_sweep

    target.check_k(k)
    ks = (None,) if k is None else _numbers("--k", k, 0)
    loads = _numbers("--streams", streams, 1)
    config = SweepConfig(loads, ks, max_tokens, requests, ignore_eos, temperature)
    asked = prompts_of(prompts, limit)
    folder = target.folder(run, "sweep")
    # More loads or another k may be added to a folder later: each point stands by itself.
    claim: dict[str, Any] = {
        "max_tokens": max_tokens,
        "requests_per_stream": requests,
        "ignore_eos": ignore_eos,
    }
    claim |= {"temperature": temperature, "server": target.identity()} | _named(asked)
    with progress_bar() as report, open_ledger(folder, claim) as ledger:

        def serve(drafted: int | None) -> AbstractContextManager["BenchClient"]:
            return target.client(report, "" if drafted is None else f"k{drafted}", drafted)

        result = measure_sweep(serve, asked, config, report, ledger, target.retrying)
        result = keep_result(result, folder, target, ledger)
    write_json(result, json_file)
    out = result_console(json_file)
    out.print(sweep_table(result["points"]))
    for line in sweep_lines(result):
        out.print(line, soft_wrap=True)
    _draw(result["points"], chart or (folder and folder / "sweep.png"))


def _draw(points: list[dict[str, Any]], file: Path | None) -> None:
    from mtp_graft.bench.charts import sweep_chart

    if file is not None:
        file.write_bytes(sweep_chart(points))
        note(f"chart: {file}")


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


@bench.command("workload", cls=SectionedCommand, rich_help_panel=SPEED)
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
    from mtp_graft.bench.ledger import open_ledger
    from mtp_graft.bench.workload import WorkloadConfig, load_workload, measure_workload

    target.check_k(k)
    config, workload = WorkloadConfig(thinking, max_tokens), load_workload()
    folder = target.folder(run, "workload")
    claim = asdict(config) | {"server": target.identity(), "k": k}
    claim |= _named([workload])
    with progress_bar() as report, open_ledger(folder, claim) as ledger, ExitStack() as stack:
        result = measure_workload(
            lambda: stack.enter_context(target.client(report, "", k)),
            *(workload, config, report, ledger, target.retrying()),
        )
        result = keep_result(result, folder, target, ledger)
    write_json(result, json_file)
    result_console(json_file).print(workload_table(result))
