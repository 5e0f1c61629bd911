"""`mtp-graft bench`: measurements of one server."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mtp_graft.cli.app import JsonOption, SpeculativeOption, bench
from mtp_graft.cli.output import note, progress_bar, result_console, write_json

if TYPE_CHECKING:  # the imports of a command load torch: `--help` need not wait for it
    from mtp_graft.bench.decode import DecodeConfig, Report
    from mtp_graft.serving.client import ServerClient

MaxTokensOption = Annotated[int, typer.Option(min=2, help="Tokens to continue each prompt by.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="How often every prompt is continued.")]
IgnoreEosOption = Annotated[bool, typer.Option(help="Go on after an end-of-sequence token.")]


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
    with progress_bar() as report:
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
            note(f"server log: {log}")
            with managed_server(options, log) as client:
                result = _measure(client, file, limit, config, report)
    write_json(result, json_file)
    result_console(json_file).print(_decode_table({"decode": result}))


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
