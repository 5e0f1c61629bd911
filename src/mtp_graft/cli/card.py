"""`mtp-graft card` and `publish`: a run's model card, and its checkpoint on the hub."""

from pathlib import Path
from typing import Annotated

import typer

from mtp_graft.cli.app import JsonOption, app
from mtp_graft.cli.output import note, result_console, write_json

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


@app.command()
def card(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to. Default: card/ in the run.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Write a run's model card with charts, from its result files."""
    from mtp_graft.bench.card import write_card

    result = write_card(run, out or run / "card")
    write_json(result, json_file)
    console = result_console(json_file)
    console.print(f"card: {result['card']}", soft_wrap=True)
    console.print(f"its data: {result['data']}", soft_wrap=True)
    for what in result["not_measured"]:
        note(f"not measured: {what}")
    for file in result["left_out"]:
        note(f"left out: {file} is of another checkpoint")


@app.command()
def publish(
    run: RunArgument,
    repo: Annotated[str, typer.Option(metavar="ID", help="OWNER/NAME on the hub.")],
    card_folder: Annotated[
        Path | None,
        typer.Option("--card", metavar="DIR", help="The card. Default: card/ in the run."),
    ] = None,
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
    """Upload a run's verified checkpoint with its card."""
    from mtp_graft.stages import publish as publishing

    card_folder = card_folder or run / "card"
    publication = publishing.plan_publication(run, repo, private, card_folder, head_only=head_only)
    result = publication.as_json() | {"dry_run": dry_run}
    if not dry_run:
        # huggingface_hub draws bars of its own, with which ours would interfere.
        result |= publishing.publish(publication, lambda label, *_: note(label))
    write_json(result, json_file)
    console = result_console(json_file)
    for file in result["files"]:
        console.print(f"{file['bytes']:>18,}  {file['path']}", highlight=False, soft_wrap=True)
    verb = "to be uploaded" if dry_run else "uploaded"
    which = "private" if result["private"] else "public"
    total = f"{len(result['files'])} files, {result['total_bytes']:,} bytes"
    console.print(f"{total} {verb} to {repo} ({which})", highlight=False, soft_wrap=True)
    if not dry_run:
        console.print(result["url"], highlight=False, soft_wrap=True)
