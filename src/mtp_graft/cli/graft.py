"""`mtp-graft graft`: a head onto a base, without calibration."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtp_graft.cli.app import JsonOption, app
from mtp_graft.cli.help import PIPELINE
from mtp_graft.cli.output import progress_bar, result_console, write_json


@app.command(rich_help_panel=PIPELINE)
def graft(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A folder or a hub id.")],
    upstream: Annotated[
        str,
        typer.Argument(
            metavar="UPSTREAM", help="The master with the head, or a published head: folder or id."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new checkpoint's folder.")],
    head: Annotated[
        Literal["mxfp4", "bf16"] | None,
        typer.Option(help="Keep the master's codes (default), or decode them; both are exact."),
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the hub.")
    ] = None,
    upstream_revision: Annotated[
        str | None, typer.Option(metavar="REV", help="The same of the upstream.")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the base's files, not link.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Graft a head onto a base without calibration, and verify the new checkpoint."""
    from mtp_graft.stages import graft as stage

    sources = (base, base_revision), (upstream, upstream_revision)
    with progress_bar() as report:
        result = stage.graft(*sources, out, head, copy=copy, report=report)
    write_json(result, json_file)
    what = f"{result['head']} head, {result['bytes_written']:,} bytes, {result['seconds']:.1f} s"
    result_console(json_file).print(f"{out}: {what}, verified", highlight=False, soft_wrap=True)
