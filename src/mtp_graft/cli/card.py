"""`mtp-graft card` and `publish`: a run's model card, and its checkpoint on the hub."""

from pathlib import Path

from mtp_graft.cli.app import JSON_FILE, app
from mtp_graft.cli.output import note, show
from mtp_graft.serving.command import argument, option

RUN = argument("RUN", "A run folder.")


@app.command()
def card(run: Path = RUN, json_file: Path | None = JSON_FILE) -> None:
    """Write a run's model card with charts, from its result files, to card/ in the run."""
    from mtp_graft.bench.card import write_card

    result = write_card(run, run / "card")
    show(result, json_file, f"card: {result['card']}", f"its data: {result['data']}")
    for what in result["not_measured"]:
        note(f"not measured: {what}")
    for file in result["left_out"]:
        note(f"left out: {file} is of another checkpoint")


@app.command()
def publish(
    run: Path = RUN,
    repo: str = option(..., "ID", "OWNER/NAME on the hub."),
    head_only: bool = option(
        False, None, "Leave out the base: for `mtp-graft graft`.", "--head-only"
    ),
    private: bool = option(False, None, "Make the repository private.", "--private"),
    dry_run: bool = option(
        False, None, "List what would be uploaded; needs no network.", "--dry-run"
    ),
    json_file: Path | None = JSON_FILE,
) -> None:
    """Upload a run's verified checkpoint with its card."""
    from mtp_graft.stages import publish as stage

    options = {"private": private, "head_only": head_only, "dry_run": dry_run}
    result = stage.publish(run, repo, run / "card", **options)
    lines = [f"{file['bytes']:>18,}  {file['path']}" for file in result["files"]]
    verb = "to be uploaded" if dry_run else "uploaded"
    which = "private" if result["private"] else "public"
    total = f"{len(result['files'])} files, {result['total_bytes']:,} bytes"
    lines.append(f"{total} {verb} to {repo} ({which})")
    show(result, json_file, *lines, *([] if dry_run else [result["url"]]))
