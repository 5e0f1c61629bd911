"""`mtp-graft card` and `publish`: a run's model card, and its checkpoint on the hub."""

from pathlib import Path
from typing import Annotated

import typer

from mtp_graft.cli.app import JsonOption, app
from mtp_graft.cli.output import note, result_console, write_json

RunArgument = Annotated[Path, typer.Argument(help="A run folder.")]


@app.command()
def card(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Where to. Default: card/ in the run.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Write a run's model card with charts, every number traced to a result file."""
    from mtp_graft.bench.card import write_card

    result = write_card(run, out or run / "card")
    write_json(result, json_file)
    console = result_console(json_file)
    console.print(f"card: {result['card']}", soft_wrap=True)
    console.print(f"{result['numbers']} numbers, traced in {result['trace']}", soft_wrap=True)
    for what in result["not_measured"]:
        note(f"not measured: {what}")
    for file in result["left_out"]:
        note(f"left out: {file} is of another checkpoint")
