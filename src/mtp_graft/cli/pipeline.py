"""`mtp-graft graft`, `demo`, `run`, a command for each stage of a recipe, `card` and `publish`."""

from pathlib import Path
from typing import Any, Literal

import typer
from rich.table import Table

from mtp_graft import pipeline
from mtp_graft.bench.page import percent, percents
from mtp_graft.cli.app import DRY_RUN, JSON_FILE, app
from mtp_graft.cli.bench import drafting_lines, same_text
from mtp_graft.cli.output import note, progress_bar, show, table
from mtp_graft.errors import GraftError
from mtp_graft.pipeline import Stage, find_bundled_recipe
from mtp_graft.serving.command import argument, option

RECIPE = argument("RECIPE", "A TOML recipe.")
FOLDER = argument("RUN", "A run folder.")
RUN = option(None, "DIR", "Run folder. Default: runs/ and the recipe's name.", "--run")
OVERRIDES = option((), "KEY=VALUE", "Override a value: capture.new_tokens=64.", "--set")
STAGES = {
    "fetch": "Fetch a recipe's base and upstream head, or find their folders.",
    "capture": "Serve the base and record what it does on the recipe's prompts.",
    "quantize": "Quantize the head with GPTQ on the captured tokens.",
    "heal": "Train the head's dense part for the base and for several drafts a step.",
    "score": "Compute every variant's offline acceptance.",
    "splice": "Write the checkpoints: the base's shards linked, one new shard.",
    "verify": "Read the checkpoints back and account for every tensor.",
}


@app.command()
def graft(
    base: str = argument("BASE", "A folder or a hub id."),
    upstream: str = argument("UPSTREAM", "The upstream, or a published head: folder or hub id."),
    out: Path = argument("OUT", "The new checkpoint's folder."),
    head: Literal["mxfp4", "bf16"] | None = option(None, None, "Default: mxfp4; both are exact."),
    base_revision: str | None = option(None, "REV", "Branch, tag or commit on the hub."),
    upstream_revision: str | None = option(None, "REV", "The same of the upstream."),
    copy: bool = option(False, None, "Copy the base's files, not link.", "--copy"),
    dry_run: bool = DRY_RUN,
    json_file: Path | None = JSON_FILE,
) -> None:
    """Graft a head onto a base without calibration, and verify it."""
    from mtp_graft.pipeline import graft as command

    sources = (base, base_revision), (upstream, upstream_revision)
    with progress_bar() as report:
        result = command.graft(*sources, out, head, copy=copy, dry_run=dry_run, report=report)
    plan = _plan_parts(result) if dry_run else [f"{result['seconds']:.1f} s, verified"]
    what = f"{out}: {result['head']} head, {result['bytes_written']:,} bytes"
    show(result, json_file, what, *plan)


@app.command()
def demo(
    run: Path = option(Path("runs/demo"), "DIR", "Run folder."),
    overrides: list[str] = OVERRIDES,
    dry_run: bool = DRY_RUN,
    json_file: Path | None = JSON_FILE,
) -> None:
    """Run the whole pipeline on the bundled tiny model."""
    run_command(find_bundled_recipe(), run, overrides, None, None, dry_run, json_file)


@app.command("run")
def run_command(
    recipe: Path = RECIPE,
    run: Path | None = RUN,
    overrides: list[str] = OVERRIDES,
    only: Stage | None = option(None, "STAGE", "Run one stage."),
    start: Stage | None = option(None, "STAGE", "Do this stage and those after it anew.", "--from"),
    dry_run: bool = DRY_RUN,
    json_file: Path | None = JSON_FILE,
) -> None:
    """Run a recipe's stages; a run that was cut off goes on."""
    from mtp_graft.recipe import load_recipe

    if only and start:  # together they would remove what --only names
        raise typer.BadParameter("--only and --from together: expected one of them")
    stages = (only,) if only else pipeline.STAGES[pipeline.STAGES.index(start or "fetch") :]
    loaded, folder = load_recipe(recipe, overrides), run or Path("runs") / recipe.stem
    if dry_run:
        from mtp_graft.pipeline.plan import plan_run

        plan = plan_run(loaded, folder, stages)
        show(plan, json_file, *_plan_parts(plan))
        if plan["inputs"] not in (None, "fit"):
            raise GraftError(plan["inputs"])
        return
    from mtp_graft.pipeline.run import run_pipeline

    with progress_bar() as report:
        result = run_pipeline(loaded, folder, report, stages, again=start is not None)
    show(result, json_file, *_result_parts(result))


def _plan_parts(plan: dict[str, Any]) -> list[str | Table]:
    """Return stages, sizes and times for people."""
    where, found = f"{', '.join(plan['stages'])}: in {plan['run']}", plan["sources"]
    if found is None or plan["unknown"] is not None:
        why = plan["unknown"] or plan["inputs"]
        return [where, why, "sizes, needs and times are not known therefore"]
    sources = [{"checkpoint": n, **each, "files": len(each["files"])} for n, each in found.items()]
    times = [{"stage": stage, **each} for stage, each in plan["seconds"].items()]
    return [
        where,
        table(sources, "checkpoint", "source", "files", "bytes", "bytes_to_download"),
        table(plan["needs"] or (), "stage", "of", "where", "bytes", "free", "what_for"),
        *([table(times, "stage", "seconds", "by")] if times else []),
        *(f"{what}: {plan[what]}" for what in ("inputs", "room") if plan[what] is not None),
    ]


def _result_parts(result: dict[str, Any]) -> list[str | Table]:
    """Return acceptance, decode speeds and where everything is, for people."""
    parts: list[str | Table] = []
    offline, served = result["acceptance_offline"], result["acceptance_served"]
    if heads := offline or served:
        drafting = "" if result["k"] in (None, 1) else f", k = {result['k']}"
        rows = Table("head", "offline acceptance", f"served acceptance{drafting}", "95 % interval")
        for head in heads:
            interval = percents(result["intervals_served"].get(head), " to ")
            rows.add_row(head, percent(offline.get(head)), percent(served.get(head)), interval)
        parts.append(rows)
    parts += [f"served, {line}" for line in drafting_lines(result)]
    if result["decode_tok_s"] is not None:
        base, mtp = result["decode_tok_s"]["base"], result["decode_tok_s"]["mtp"]
        with_head = "with DSpark" if result["drafter"] == "dspark" else "with MTP"
        speeds = f"base {base:.1f} tok/s, {with_head} {mtp:.1f} tok/s ({mtp / base:.2f} times)"
        parts += [f"decode: {speeds}", f"greedy text: {same_text(result)}"]
    paths = {what: result[what] for what in ("checkpoint", "report") if result[what] is not None}
    return [*parts, *(f"{what}: {path}" for what, path in paths.items() if Path(path).exists())]


def _stage_command(stage: str, summary: str) -> None:
    """Add the command that runs one stage of a recipe, in its run folder."""

    @app.command(stage, help=summary)
    def command(
        recipe: Path = RECIPE,
        run: Path | None = RUN,
        overrides: list[str] = OVERRIDES,
        json_file: Path | None = JSON_FILE,
    ) -> None:
        from mtp_graft.pipeline.run import run_stage
        from mtp_graft.recipe import load_recipe

        folder = run or Path("runs") / recipe.stem
        with progress_bar() as report:
            result = run_stage(load_recipe(recipe, overrides), folder, stage, report)
        show(result, json_file, f"{stage}: done, in {folder / stage}")


for _stage, _summary in STAGES.items():
    _stage_command(_stage, _summary)


@app.command()
def card(run: Path = FOLDER, json_file: Path | None = JSON_FILE) -> None:
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
    run: Path = FOLDER,
    repo: str = option(..., "ID", "OWNER/NAME on the hub."),
    head_only: bool = option(False, None, "Leave out the base: for `graft`.", "--head-only"),
    private: bool = option(False, None, "Make the repository private.", "--private"),
    dry_run: bool = DRY_RUN,
    json_file: Path | None = JSON_FILE,
) -> None:
    """Upload a run's verified checkpoint with its card."""
    from mtp_graft.stages import publish as stage

    how = {"private": private, "head_only": head_only, "dry_run": dry_run}
    result = stage.publish(run, repo, run / "card", **how)
    lines = [f"{file['bytes']:>18,}  {file['path']}" for file in result["files"]]
    what = f"{len(result['files'])} files, {result['total_bytes']:,} bytes"
    where = f"{repo} ({'private' if result['private'] else 'public'})"
    lines.append(f"{what} {'to be uploaded' if dry_run else 'uploaded'} to {where}")
    show(result, json_file, *lines, *([] if dry_run else [result["url"]]))
