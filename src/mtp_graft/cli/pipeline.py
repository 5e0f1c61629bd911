"""`mtp-graft demo`, `run`, and one command for each stage of a recipe."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mtp_graft.cli.app import JsonOption, app
from mtp_graft.cli.output import is_stdout, progress_bar, result_console, write_json

RecipeArgument = Annotated[Path, typer.Argument(help="A TOML recipe.")]
RunOption = Annotated[
    Path | None, typer.Option("--run", help="Run folder. Default: runs/ and the recipe's name.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value: capture.new_tokens=64."),
]


@app.command()
def demo(
    run: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    overrides: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Run the whole pipeline on the bundled tiny model: graft its head on, serve it, measure it."""
    from mtp_graft.pipeline import find_bundled_recipe

    _run_recipe(find_bundled_recipe(), run, overrides, None, None, dry_run, json_file)


@app.command("run")
def run_command(
    recipe: RecipeArgument,
    run: RunOption = None,
    overrides: SetOption = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run one stage.")] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Do this stage and those after it anew."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Run a recipe's stages, from capture to report; a run that was cut off goes on."""
    if only is not None and start is not None:  # together they would remove what --only names
        raise typer.BadParameter("give one of --only and --from")
    folder = run or Path("runs") / recipe.stem
    _run_recipe(recipe, folder, overrides, only, start, dry_run, json_file)


def _run_recipe(
    file: Path,
    run: Path,
    overrides: list[str] | None,
    only: str | None,
    start: str | None,
    dry_run: bool,
    json_file: Path | None,
) -> None:
    from mtp_graft.pipeline import choose_stages, run_pipeline
    from mtp_graft.recipe import load_recipe

    recipe = load_recipe(file, overrides or ())
    stages = choose_stages(only, start)
    if dry_run:
        plan = {"run": str(run), "stages": list(stages), "recipe": recipe.as_dict()}
        write_json(plan, json_file)
        if not is_stdout(json_file):
            print(json.dumps(plan, indent=2, ensure_ascii=False))
        return
    with progress_bar() as report:
        result = run_pipeline(recipe, run, report, stages, again=start is not None)
    write_json(result, json_file)
    _print_result(result, result_console(json_file))


def _print_result(result: dict[str, Any], out: Console) -> None:
    """Show acceptance, decode speeds and where everything is."""
    if result["acceptance_offline"] or result["acceptance_served"]:
        table = Table("head", "offline acceptance", "served acceptance", "95 % interval")
        for name in result["acceptance_offline"] or result["acceptance_served"]:
            offline = result["acceptance_offline"].get(name)
            served = result["acceptance_served"].get(name)
            low, high = result["intervals_served"].get(name, (None, None))
            interval = "-" if low is None else f"{_percent(low)} to {_percent(high)}"
            table.add_row(name, _percent(offline), _percent(served), interval)
        out.print(table)
    if result["decode_tok_s"] is not None:
        base, mtp = result["decode_tok_s"]["base"], result["decode_tok_s"]["mtp"]
        ratio = mtp / base
        out.print(f"decode: base {base:.1f} tok/s, with MTP {mtp:.1f} tok/s ({ratio:.2f} times)")
        out.print(_identity_line(result["divergences"]))
    for what in ("checkpoint", "report"):
        if result[what] is not None and Path(result[what]).exists():
            out.print(f"{what}: {result[what]}", soft_wrap=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _identity_line(divergences: list[dict[str, Any]]) -> str:
    if not divergences:
        return "greedy text: identical on every prompt"
    where = ", ".join(
        f"{d['prompt']} at {d['position']} (margin {d['margin']})" for d in divergences
    )
    return f"greedy text: differs on {len(divergences)} prompts: {where}"


def _stage_command(stage: str, summary: str) -> None:
    """Add the command that runs one stage of a recipe, in its run folder."""

    @app.command(stage, help=summary)
    def command(
        recipe: RecipeArgument,
        run: RunOption = None,
        overrides: SetOption = None,
        json_file: JsonOption = None,
    ) -> None:
        from mtp_graft.pipeline import run_stage
        from mtp_graft.recipe import load_recipe

        folder = run or Path("runs") / recipe.stem
        with progress_bar() as report:
            result = run_stage(load_recipe(recipe, overrides or ()), folder, stage, report)
        write_json(result, json_file)
        result_console(json_file).print(f"{stage}: done, in {folder / stage}", soft_wrap=True)


_stage_command("fetch", "Fetch a recipe's base and upstream head, or find their folders.")
_stage_command("capture", "Serve the base and record what it does on the recipe's prompts.")
_stage_command("quantize", "Quantize the head with GPTQ on the captured tokens.")
_stage_command("score", "Compute every variant's offline acceptance.")
_stage_command("splice", "Write the checkpoints: the base's shards linked, one new shard each.")
_stage_command("verify", "Read the checkpoints back and account for every tensor.")
