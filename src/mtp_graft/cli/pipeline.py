"""`mtp-graft graft`, `demo`, `run`, and one command for each stage of a recipe."""

from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table

from mtp_graft.bench.page import percent, percent_interval
from mtp_graft.cli.app import DryRunOption, JsonOption, app, argument, option
from mtp_graft.cli.bench import drafting_lines
from mtp_graft.cli.output import progress_bar, show, table

RecipeArgument = Annotated[Path, argument("RECIPE", "A TOML recipe.")]
RunOption = Annotated[
    Path | None, option("DIR", "Run folder. Default: runs/ and the recipe's name.", "--run")
]
SetOption = Annotated[
    list[str] | None, option("KEY=VALUE", "Override a value: capture.new_tokens=64.", "--set")
]
STAGES = {
    "fetch": "Fetch a recipe's base and upstream head, or find their folders.",
    "capture": "Serve the base and record what it does on the recipe's prompts.",
    "quantize": "Quantize the head with GPTQ on the captured tokens.",
    "score": "Compute every variant's offline acceptance.",
    "splice": "Write the checkpoints: the base's shards linked, one new shard.",
    "verify": "Read the checkpoints back and account for every tensor.",
}


@app.command()
def graft(
    base: Annotated[str, argument("BASE", "A folder or a hub id.")],
    upstream: Annotated[
        str,
        argument("UPSTREAM", "The master with the head, or a published head: folder or id."),
    ],
    out: Annotated[Path, argument("OUT", "The new checkpoint's folder.")],
    head: Annotated[
        Literal["mxfp4", "bf16"] | None,
        option(None, "Keep the master's codes (default), or decode them; both are exact."),
    ] = None,
    base_revision: Annotated[str | None, option("REV", "Branch, tag or commit on the hub.")] = None,
    upstream_revision: Annotated[str | None, option("REV", "The same of the upstream.")] = None,
    copy: Annotated[bool, option(None, "Copy the base's files, not link.", "--copy")] = False,
    json_file: JsonOption = None,
) -> None:
    """Graft a head onto a base without calibration, and verify it."""
    from mtp_graft.stages import graft as stage

    sources = (base, base_revision), (upstream, upstream_revision)
    with progress_bar() as report:
        result = stage.graft(*sources, out, head, copy=copy, report=report)
    what = f"{result['head']} head, {result['bytes_written']:,} bytes, {result['seconds']:.1f} s"
    show(result, json_file, f"{out}: {what}, verified")


@app.command()
def demo(
    run: Annotated[Path, option("DIR", "Run folder.")] = Path("runs/demo"),
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    json_file: JsonOption = None,
) -> None:
    """Run the whole pipeline on the bundled tiny model."""
    from mtp_graft.pipeline import find_bundled_recipe

    run_command(find_bundled_recipe(), run, overrides, None, None, dry_run, json_file)


@app.command("run")
def run_command(
    recipe: RecipeArgument,
    run: RunOption = None,
    overrides: SetOption = None,
    only: Annotated[str | None, option("STAGE", "Run one stage.")] = None,
    start: Annotated[
        str | None, option("STAGE", "Do this stage and those after it anew.", "--from")
    ] = None,
    dry_run: DryRunOption = False,
    json_file: JsonOption = None,
) -> None:
    """Run a recipe's stages; a run that was cut off goes on."""
    from mtp_graft.pipeline import choose_stages
    from mtp_graft.recipe import load_recipe

    stages, folder = choose_stages(only, start), run or Path("runs") / recipe.stem
    loaded = load_recipe(recipe, overrides or ())
    if dry_run:
        from mtp_graft.pipeline.plan import plan_run

        plan = plan_run(loaded, folder, stages)
        show(plan, json_file, *_plan_parts(plan))
        return
    from mtp_graft.pipeline.run import run_pipeline

    with progress_bar() as report:
        result = run_pipeline(loaded, folder, report, stages, again=start is not None)
    show(result, json_file, *_result_parts(result))


def _plan_parts(plan: dict[str, Any]) -> list[str | Table]:
    """Return stages, sizes and times for people."""
    where = f"{', '.join(plan['stages'])}: in {plan['run']}"
    if plan["unknown"] is not None:
        return [where, plan["unknown"], "sizes, needs and times are not known therefore"]
    sources = [
        (
            *(name, source["source"], len(source["files"])),
            *(f"{source[key] / 1e9:,.3f}" for key in ("bytes", "bytes_to_download")),
        )
        for name, source in plan["sources"].items()
    ]
    needs = [
        (n["stage"], n["of"], n["where"], f"{n['bytes'] / 1e9:,.3f}", n["what_for"])
        for n in plan["needs"] or ()
    ]
    times = [
        (stage, "-" if each["seconds"] is None else f"{each['seconds'] / 60:.1f} min", each["by"])
        for stage, each in plan["seconds"].items()
    ]
    fits = [f"{what}: {plan[what]}" for what in ("inputs", "room") if plan[what] is not None]
    return [
        where,
        table(("checkpoint", "from", "files", "GB", "GB to download"), sources),
        table(("stage", "needs", "of", "GB at most", "for"), needs),
        table(("stage", "about", "estimated by"), times),
        *fits,
    ]


def _result_parts(result: dict[str, Any]) -> list[str | Table]:
    """Return acceptance, decode speeds and where everything is, for people."""
    parts: list[str | Table] = []
    offline, served = result["acceptance_offline"], result["acceptance_served"]
    if offline or served:
        drafting = "" if result["k"] in (None, 1) else f", k = {result['k']}"
        columns = ("head", "offline acceptance", f"served acceptance{drafting}", "95 % interval")
        rows = [
            (
                *(name, percent(offline.get(name)), percent(served.get(name))),
                percent_interval(result["intervals_served"].get(name)),
            )
            for name in offline or served
        ]
        parts.append(table(columns, rows))
    parts += [f"served, {line}" for line in drafting_lines(result)]
    if result["decode_tok_s"] is not None:
        base, mtp = result["decode_tok_s"]["base"], result["decode_tok_s"]["mtp"]
        speeds = f"base {base:.1f} tok/s, with MTP {mtp:.1f} tok/s ({mtp / base:.2f} times)"
        places = [f"{d['prompt']} at {d['position']}" for d in result["divergences"]]
        differs = f"differs ({', '.join(places) or 'between rounds'}; margins are in the report)"
        text = "identical on every prompt" if result["greedy_identical"] else differs
        parts += [f"decode: {speeds}", f"greedy text: {text}"]
    paths = {what: result[what] for what in ("checkpoint", "report") if result[what] is not None}
    return [*parts, *(f"{what}: {path}" for what, path in paths.items() if Path(path).exists())]


def _stage_command(stage: str, summary: str) -> None:
    """Add the command that runs one stage of a recipe, in its run folder."""

    @app.command(stage, help=summary)
    def command(
        recipe: RecipeArgument,
        run: RunOption = None,
        overrides: SetOption = None,
        json_file: JsonOption = None,
    ) -> None:
        from mtp_graft.pipeline.run import run_stage
        from mtp_graft.recipe import load_recipe
        from mtp_graft.stages.parallel import is_first_rank

        folder = run or Path("runs") / recipe.stem
        with progress_bar() as report:
            result = run_stage(load_recipe(recipe, overrides or ()), folder, stage, report)
        if is_first_rank():  # of torchrun's: the first one tells
            show(result, json_file, f"{stage}: done, in {folder / stage}")


for _stage, _summary in STAGES.items():
    _stage_command(_stage, _summary)
