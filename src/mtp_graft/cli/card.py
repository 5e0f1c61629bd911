"""`mtp-graft card` and `publish`: a run's model card, and its checkpoint on the hub."""

from pathlib import Path
from typing import Annotated

import typer

from mtp_graft.cli.app import JsonOption, app
from mtp_graft.cli.help import PUBLISH
from mtp_graft.cli.output import note, result_console, write_json

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


@app.command(rich_help_panel=PUBLISH)
def card(run: RunArgument, json_file: JsonOption = None) -> None:
    """Write a run's model card with charts, from its result files, to card/ in the run."""
    from mtp_graft.bench.card import write_card

    result = write_card(run, run / "card")
    write_json(result, json_file)
    console = result_console(json_file)
    console.print(f"card: {result['card']}\nits data: {result['data']}", soft_wrap=True)
    for what in result["not_measured"]:
        note(f"not measured: {what}")
    for file in result["left_out"]:
        note(f"left out: {file} is of another checkpoint")


@app.command(rich_help_panel=PUBLISH)
def publish(
    run: RunArgument,
    repo: Annotated[str, typer.Option(metavar="ID", help="OWNER/NAME on the hub.")],
    head_only: Annotated[
        bool, typer.Option("--head-only", help="Leave out the base: for `mtp-graft graft`.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded; needs no network.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Upload a run's verified checkpoint with its card; a call that failed can be repeated."""
    from mtp_graft.stages import publish as publishing

    publication = publishing.plan_publication(run, repo, private, run / "card", head_only=head_only)
    result = publication.as_json() | {"dry_run": dry_run}
    if not dry_run:
        # huggingface_hub draws bars of its own, with which ours would interfere.
        result |= publishing.publish(publication, lambda label, *_: note(label))
    write_json(result, json_file)
    console = result_console(json_file)
    lines = [f"{file['bytes']:>18,}  {file['path']}" for file in result["files"]]
    verb = "to be uploaded" if dry_run else "uploaded"
    which = "private" if result["private"] else "public"
    total = f"{len(result['files'])} files, {result['total_bytes']:,} bytes"
    for line in [
        *lines,
        f"{total} {verb} to {repo} ({which})",
        *([] if dry_run else [result["url"]]),
    ]:
        console.print(line, highlight=False, soft_wrap=True)
