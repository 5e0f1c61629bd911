"""The Typer applications that commands register with, and options that several of them have."""

from pathlib import Path
from typing import Annotated

import typer

from mtp_graft.cli.output import check_writable

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
    typer.Option(
        "--json",
        metavar="FILE",
        callback=check_writable,
        help="Write the result as JSON; - for standard output.",
    ),
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


@app.callback()
def _root() -> None:
    """Hold the commands; a callback keeps them commands even when there is only one."""
