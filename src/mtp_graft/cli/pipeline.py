"""`mtp-graft demo`, `run`, and one command for each stage of a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mtp_graft.cli.app import JsonOption, app
from mtp_graft.cli.bench import drafting_lines
from mtp_graft.cli.help import PIPELINE
from mtp_graft.cli.output import progress_bar, result_console, write_json

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML recipe.")]
RunOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="Run folder. Default: runs/ and the recipe's name."),
]
KOption = Annotated[
    int | None,
    typer.Option(
        *("--k", "-k"),
        min=1,
        metavar="N",
        help="Tokens to draft a step, as --set bench.k=N. Default: 3 on GPUs, 1 on a CPU.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value: capture.new_tokens=64."),
]


DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be run.")]


@app.command(rich_help_panel=PIPELINE)
def demo(
    run: Annotated[Path, typer.Option(metavar="DIR", help="Run folder.")] = Path("runs/demo"),
    k: KOption = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    json_file: JsonOption = None,
) -> None:
    """Run the whole pipeline on the bundled tiny model: graft its head on, serve it, measure it."""
    from mtp_graft.pipeline import find_bundled_recipe

    _run_recipe(find_bundled_recipe(), run, overrides, k, None, None, dry_run, json_file)


@app.command("run", rich_help_panel=PIPELINE)
def run_command(
    recipe: RecipeArgument,
    run: RunOption = None,
    k: KOption = None,
    overrides: SetOption = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run one stage.")] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Do this stage and those after it anew."),
    ] = None,
    dry_run: DryRunOption = False,
    json_file: JsonOption = None,
) -> None:
    """Run a recipe's stages, from capture to report; a run that was cut off goes on."""
    folder = run or Path("runs") / recipe.stem
    _run_recipe(recipe, folder, overrides, k, only, start, dry_run, json_file)


def _run_recipe(
    file: Path,
    run: Path,
    overrides: list[str] | None,
    k: int | None,
    only: str | None,
    start: str | None,
    dry_run: bool,
    json_file: Path | None,
) -> None:
    from mtp_graft.pipeline.plan import plan_run
    from mtp_graft.pipeline.run import choose_stages, run_pipeline
    from mtp_graft.recipe import load_recipe

    stages = choose_stages(only, start)
    drafts = [] if k is None else [f"bench.k={k}"]
    recipe = load_recipe(file, [*(overrides or ()), *drafts])
    if dry_run:
        plan = plan_run(recipe, run, stages)
        write_json(plan, json_file)
        _print_plan(plan, result_console(json_file))
        return
    with progress_bar() as report:
        result = run_pipeline(recipe, run, report, stages, again=start is not None)
    write_json(result, json_file)
    _print_result(result, result_console(json_file))


def _print_plan(plan: dict[str, Any], out: Console) -> None:
    """Show stages, sizes and times for people."""
    out.print(f"{', '.join(plan['stages'])}: in {plan['run']}", soft_wrap=True)
    if plan["unknown"] is not None:
        out.print(plan["unknown"], soft_wrap=True, markup=False)
        out.print("sizes, needs and times are not known therefore")
        return
    sources = Table("checkpoint", "from", "files", "GB", "GB to download")
    for name, source in plan["sources"].items():
        sizes = (f"{source[key] / 1e9:,.3f}" for key in ("bytes", "bytes_to_download"))
        sources.add_row(name, source["source"], str(len(source["files"])), *sizes)
    needs = Table("stage", "needs", "of", "GB at most", "for")
    for need in plan["needs"] or ():
        row = need["stage"], need["of"], need["where"], f"{need['bytes'] / 1e9:,.3f}"
        needs.add_row(*row, need["what_for"])
    times = Table("stage", "about", "estimated by")
    for stage, estimate in plan["seconds"].items():
        seconds = estimate["seconds"]
        about = "-" if seconds is None else f"{seconds / 60:.1f} min"
        times.add_row(stage, about, estimate["by"])
    for table in (sources, needs, times):
        out.print(table)
    for what in ("inputs", "room"):
        if plan[what] is not None:
            out.print(f"{what}: {plan[what]}", soft_wrap=True, markup=False)


def _print_result(result: dict[str, Any], out: Console) -> None:
    """Show acceptance, decode speeds and where everything is."""
    if result["acceptance_offline"] or result["acceptance_served"]:
        drafting = "" if result["k"] in (None, 1) else f", k = {result['k']}"
        table = Table("head", "offline acceptance", f"served acceptance{drafting}", "95 % interval")
        for name in result["acceptance_offline"] or result["acceptance_served"]:
            found = (result[f"acceptance_{where}"].get(name) for where in ("offline", "served"))
            interval = map(_percent, result["intervals_served"].get(name, ()))
            table.add_row(name, *map(_percent, found), " to ".join(interval) or "-")
        out.print(table)
    for line in drafting_lines(result):
        out.print(f"served, {line}", soft_wrap=True)
    for pair, (low, high) in result["acceptance_difference"].items():
        ours, _, theirs = pair.partition("-")
        within = f"{100 * low:+.1f} to {100 * high:+.1f} points"
        out.print(f"{ours} less {theirs}, served, first drafts of the same texts: {within} (95 %)")
    if result["decode_tok_s"] is not None:
        base, mtp = result["decode_tok_s"]["base"], result["decode_tok_s"]["mtp"]
        ratio = mtp / base
        out.print(f"decode: base {base:.1f} tok/s, with MTP {mtp:.1f} tok/s ({ratio:.2f} times)")
        out.print(_identity_line(result["greedy_identical"], result["divergences"]))
    for what in ("checkpoint", "report"):
        if result[what] is not None and Path(result[what]).exists():
            out.print(f"{what}: {result[what]}", soft_wrap=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _identity_line(identical: bool, divergences: list[dict[str, Any]]) -> str:
    if identical:
        return "greedy text: identical on every prompt"
    if not divergences:
        return "greedy text: not the same in every round, with the same server"
    where = ", ".join(
        f"{d['prompt']} at {d['position']} (margin {d['margin']})" for d in divergences
    )
    return f"greedy text: differs on {len(divergences)} prompts: {where}"


def _stage_command(stage: str, summary: str) -> None:
    """Add the command that runs one stage of a recipe, in its run folder."""

    @app.command(stage, help=summary, rich_help_panel=PIPELINE)
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
        if not is_first_rank():  # of torchrun's: the first one tells
            return
        write_json(result, json_file)
        result_console(json_file).print(f"{stage}: done, in {folder / stage}", soft_wrap=True)


_stage_command("fetch", "Fetch a recipe's base and upstream head, or find their folders.")
_stage_command("capture", "Serve the base and record what it does on the recipe's prompts.")
_stage_command("quantize", "Quantize the head with GPTQ on the captured tokens.")
_stage_command("score", "Compute every variant's offline acceptance.")
_stage_command("splice", "Write the checkpoints: the base's shards linked, one new shard each.")
_stage_command("verify", "Read the checkpoints back and account for every tensor.")
