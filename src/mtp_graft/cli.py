"""The `mtp-graft` command; what it does is in `pipeline`, `serving` and `bench`."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mtp_graft.errors import GraftError

if TYPE_CHECKING:  # the imports of a command load torch: `--help` need not wait for it
    from mtp_graft.bench.decode import DecodeConfig, Report
    from mtp_graft.serving.client import ServerClient

app = typer.Typer(
    help="Give a quantized DeepSeek-V4 its multi-token-prediction head back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench = typer.Typer(help="Measure a server.", no_args_is_help=True)
app.add_typer(bench, name="bench")

JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output."),
]
SpeculativeOption = Annotated[
    int | None,
    typer.Option(
        "--num-speculative-tokens",
        "-k",
        min=0,
        help="Tokens to draft a step; 0 leaves the head out. Default: 1 if there is a head.",
    ),
]
MaxTokensOption = Annotated[int, typer.Option(min=2, help="Tokens to continue each prompt by.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="How often every prompt is continued.")]
IgnoreEosOption = Annotated[bool, typer.Option(help="Go on after an end-of-sequence token.")]


@app.callback()
def _root() -> None:
    """Hold the commands; a callback keeps them commands even when there is only one."""


@app.command()
def serve(
    checkpoint: Annotated[Path, typer.Argument(help="A DeepSeek-V4 checkpoint folder.")],
    extra: Annotated[
        list[str] | None, typer.Argument(help="After --: arguments for vllm serve, as they are.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    tp: Annotated[
        int, typer.Option("--tensor-parallel-size", "--tp", min=1, help="Ranks to shard over.")
    ] = 1,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest sequence.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    num_speculative_tokens: SpeculativeOption = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name in the API.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="As vLLM names it.")] = "fp8",
    kv_cache_gib: Annotated[
        float | None, typer.Option(min=0.01, help="KV cache per rank. Default: 1 on a CPU.")
    ] = None,
    prefix_caching: Annotated[bool, typer.Option(help="Reuse shared prompt prefixes.")] = True,
    enforce_eager: Annotated[
        bool | None, typer.Option(help="Do not compile. Default: eager on a CPU.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", help="Key that /v1 requests must show.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command only.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Serve a checkpoint with vLLM in the foreground, drafting with its head if it has one."""
    from mtp_graft.serving.command import LOOPBACK_HOSTS, ServeOptions, build_command
    from mtp_graft.serving.server import serve_foreground

    if json_file is not None and not dry_run:
        raise typer.BadParameter("needs --dry-run: a server has no result", param_hint="--json")
    options = ServeOptions(
        checkpoint,
        host=host,
        port=port,
        tensor_parallel_size=tp,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        num_speculative_tokens=num_speculative_tokens,
        served_model_names=tuple(served_model_name or ()),
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_gib=kv_cache_gib,
        prefix_caching=prefix_caching,
        enforce_eager=enforce_eager,
        api_key=api_key,
        extra_args=tuple(extra or ()),
    )
    if host not in LOOPBACK_HOSTS and api_key is None:
        _note(f"warning: {host} is not loopback and there is no --api-key: anyone may use it")
    if dry_run:
        command = build_command(options)
        _write_json({"env": command.printable_env(), "argv": list(command.argv)}, json_file)
        if not _is_stdout(json_file):
            print(command.as_shell())
        return
    raise typer.Exit(serve_foreground(options, on_ready=lambda url: _note(f"ready: {url}")))


RecipeArgument = Annotated[Path, typer.Argument(help="A TOML recipe.")]
RunOption = Annotated[
    Path | None, typer.Option("--run", help="Run folder. Default: runs/ and the recipe's name.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value: capture.new_tokens=64."),
]


@app.command()
def demo(
    run: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    overrides: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Run the whole pipeline on the bundled tiny model: graft its head on, serve it, measure it."""
    from mtp_graft.pipeline import find_bundled_recipe

    _run_recipe(find_bundled_recipe(), run, overrides, None, None, dry_run, json_file)


@app.command("run")
def run_command(
    recipe: RecipeArgument,
    run: RunOption = None,
    overrides: SetOption = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run one stage.")] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Do this stage and those after it anew."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Run a recipe's stages, from capture to report; a run that was cut off goes on."""
    if only is not None and start is not None:  # together they would remove what --only names
        raise typer.BadParameter("give one of --only and --from")
    folder = run or Path("runs") / recipe.stem
    _run_recipe(recipe, folder, overrides, only, start, dry_run, json_file)


def _run_recipe(
    file: Path,
    run: Path,
    overrides: list[str] | None,
    only: str | None,
    start: str | None,
    dry_run: bool,
    json_file: Path | None,
) -> None:
    from mtp_graft.pipeline import choose_stages, run_pipeline
    from mtp_graft.recipe import load_recipe

    recipe = load_recipe(file, overrides or ())
    stages = choose_stages(only, start)
    if dry_run:
        plan = {"run": str(run), "stages": list(stages), "recipe": recipe.as_dict()}
        _write_json(plan, json_file)
        if not _is_stdout(json_file):
            print(json.dumps(plan, indent=2, ensure_ascii=False))
        return
    with _progress() as report:
        result = run_pipeline(recipe, run, report, stages, again=start is not None)
    _write_json(result, json_file)
    _print_result(result, _result_console(json_file))


def _print_result(result: dict[str, Any], out: Console) -> None:
    """Show acceptance, decode speeds and where everything is."""
    if result["acceptance_offline"] or result["acceptance_served"]:
        table = Table("head", "offline acceptance", "served acceptance", "95 % interval")
        for name in result["acceptance_offline"] or result["acceptance_served"]:
            offline = result["acceptance_offline"].get(name)
            served = result["acceptance_served"].get(name)
            low, high = result["intervals_served"].get(name, (None, None))
            interval = "-" if low is None else f"{_percent(low)} to {_percent(high)}"
            table.add_row(name, _percent(offline), _percent(served), interval)
        out.print(table)
    if result["decode_tok_s"] is not None:
        base, mtp = result["decode_tok_s"]["base"], result["decode_tok_s"]["mtp"]
        ratio = mtp / base
        out.print(f"decode: base {base:.1f} tok/s, with MTP {mtp:.1f} tok/s ({ratio:.2f} times)")
        out.print(_identity_line(result["divergences"]))
    for what in ("checkpoint", "report"):
        if result[what] is not None and Path(result[what]).exists():
            out.print(f"{what}: {result[what]}", soft_wrap=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _stage_command(stage: str, summary: str) -> None:
    """Add the command that runs one stage of a recipe, in its run folder."""

    @app.command(stage, help=summary)
    def command(
        recipe: RecipeArgument,
        run: RunOption = None,
        overrides: SetOption = None,
        json_file: JsonOption = None,
    ) -> None:
        from mtp_graft.pipeline import run_stage
        from mtp_graft.recipe import load_recipe

        folder = run or Path("runs") / recipe.stem
        with _progress() as report:
            result = run_stage(load_recipe(recipe, overrides or ()), folder, stage, report)
        _write_json(result, json_file)
        _result_console(json_file).print(f"{stage}: done, in {folder / stage}", soft_wrap=True)


_stage_command("fetch", "Fetch a recipe's base and upstream head, or find their folders.")
_stage_command("capture", "Serve the base and record what it does on the recipe's prompts.")
_stage_command("quantize", "Quantize the head with GPTQ on the captured tokens.")
_stage_command("score", "Compute every variant's offline acceptance.")
_stage_command("splice", "Write the checkpoints: the base's shards linked, one new shard each.")
_stage_command("verify", "Read the checkpoints back and account for every tensor.")


@bench.command("decode")
def bench_decode(
    base_url: Annotated[str | None, typer.Option(help="A running server's address.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Serve this folder meanwhile.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON Lines of {"id", "text"}. Default: the tiny model\'s.')
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first prompts only.")] = None,
    max_tokens: MaxTokensOption = 128,
    rounds: RoundsOption = 3,
    ignore_eos: IgnoreEosOption = True,
    num_speculative_tokens: SpeculativeOption = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest sequence.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="The key.")] = None,
    log: Annotated[Path | None, typer.Option(help="Where the server's output goes.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure greedy single-stream decode speed, time to first token and acceptance."""
    from mtp_graft.bench.decode import DecodeConfig
    from mtp_graft.serving.client import ServerClient
    from mtp_graft.serving.command import ServeOptions
    from mtp_graft.serving.server import managed_server

    if (base_url is None) == (checkpoint is None):
        raise typer.BadParameter("give one of --base-url and --checkpoint")
    config = DecodeConfig(max_tokens, rounds, ignore_eos)
    file = prompts or _bundled_prompts()
    with _progress() as report:
        if checkpoint is None:
            assert base_url is not None
            with ServerClient(base_url, api_key) as client:
                result = _measure(client, file, limit, config, report)
        else:
            options = ServeOptions(
                checkpoint,
                port=0,
                max_model_len=max_model_len,
                num_speculative_tokens=num_speculative_tokens,
                prefix_caching=False,
                api_key=api_key,
            )
            log = log or Path(tempfile.mkdtemp(prefix="mtp-graft-")) / "vllm.log"
            _note(f"server log: {log}")
            with managed_server(options, log) as client:
                result = _measure(client, file, limit, config, report)
    _write_json(result, json_file)
    _result_console(json_file).print(_decode_table({"decode": result}))


def _bundled_prompts() -> Path:
    from mtp_graft.pipeline import find_bundled_recipe
    from mtp_graft.recipe import load_recipe

    return Path(load_recipe(find_bundled_recipe()).bench.prompts)


def _measure(
    client: "ServerClient",
    prompt_file: Path,
    limit: int | None,
    config: "DecodeConfig",
    report: "Report",
) -> dict[str, Any]:
    from mtp_graft.bench.decode import decode_result, measure_decode, tokenize
    from mtp_graft.serving.prompts import load_prompts

    prompts = tokenize(client, load_prompts(prompt_file, limit))
    return decode_result(measure_decode(client, prompts, config, report), config)


def _decode_table(results: dict[str, dict[str, Any]]) -> Table:
    """Return one row per server, each cell `median (min to max)`."""
    table = Table("", "decode tok/s", "TTFT ms", "ms per token", "acceptance")
    for name, result in results.items():
        keys = ("decode_tok_s", "ttft_ms", "tpot_ms")
        acceptance = result["acceptance"]
        accepted = "-" if acceptance is None else f"{100 * acceptance['median']:.1f} %"
        table.add_row(name, *(_spread_cell(result[key]) for key in keys), accepted)
    return table


def _spread_cell(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"


def _identity_line(divergences: list[dict[str, Any]]) -> str:
    if not divergences:
        return "greedy text: identical on every prompt"
    where = ", ".join(
        f"{d['prompt']} at {d['position']} (margin {d['margin']})" for d in divergences
    )
    return f"greedy text: differs on {len(divergences)} prompts: {where}"


@contextmanager
def _progress() -> Iterator["Report"]:
    """Show on standard error what is going on: a bar on a terminal, else a line per step."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        last = ""

        def log(label: str, _done: int, _total: int) -> None:
            nonlocal last
            step = label.partition(",")[0]  # without a count of seconds
            if step != last:
                _note(step)
            last = step

        yield log
        return
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)

        def report(label: str, done: int, total: int) -> None:
            progress.update(task, description=label, completed=done, total=total or None)

        yield report


def _write_json(result: dict[str, Any], target: Path | None) -> None:
    if target is None:
        return
    text = json.dumps(result, indent=2, ensure_ascii=False)
    if _is_stdout(target):
        print(text)
        return
    try:
        target.write_text(text + "\n")
    except OSError as error:
        raise GraftError(f"{target}: cannot be written ({error.strerror})") from error


def _is_stdout(target: Path | None) -> bool:
    return target is not None and str(target) == "-"


def _result_console(json_target: Path | None) -> Console:
    """Return standard output, or standard error where JSON has standard output for itself."""
    return Console(stderr=_is_stdout(json_target))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line; a GraftError is one line on standard error and status 1."""
    try:
        app()
    except GraftError as error:
        _note("error: " + " ".join(str(error).split()))
        sys.exit(1)
    except OSError as error:  # a path that cannot be used, or a disk that is full
        _note(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
