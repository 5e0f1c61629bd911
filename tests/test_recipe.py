"""Recipes: read exactly, or refused with the name of what is wrong."""

import os
import tomllib
from pathlib import Path

import pytest

from mtp_graft.errors import GraftError
from mtp_graft.recipe import load_recipe

MISTAKES = tomllib.loads(Path(__file__).with_name("mistakes.toml").read_text())["overrides"]
MISTAKES |= {f"model.name={'x' * 300}": "expected up to 60 letters"}
MINIMAL = """
[model]
name = "m"
base = "./base"
upstream = "owner/name"
[capture]
calibration_prompts = "../c.jsonl"
evaluation_prompts = "hub:owner/data"
[bench]
prompts = "p.jsonl"
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "minimal.toml"
    path.parent.mkdir()
    path.write_text(MINIMAL)
    return path


def test_paths_are_relative_to_the_recipe_and_hub_ids_stay(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe.model.base == str(minimal.parent / "base")
    assert recipe.model.upstream == "owner/name"
    assert recipe.capture.calibration_prompts == str(minimal.parent.parent / "c.jsonl")
    assert recipe.capture.evaluation_prompts == "hub:owner/data"
    assert recipe.bench.prompts == str(minimal.parent / "p.jsonl")


def test_overrides_are_toml_values_or_bare_strings_and_the_last_wins(
    minimal: Path, tmp_path: Path
) -> None:
    overrides = ["splice.variant=rtn", 'splice.variant="bf16"', "quantize.damp=1"]
    overrides += ["serve.extra_args=['--x', '--y=1']", "bench.prompts=here.jsonl"]
    recipe = load_recipe(minimal, overrides)
    assert recipe.splice.variant == "bf16"
    assert recipe.quantize.damp == 1.0 and isinstance(recipe.quantize.damp, float)
    assert recipe.serve.extra_args == ("--x", "--y=1")
    assert recipe.bench.prompts == str(tmp_path / "here.jsonl")  # typed in this folder


@pytest.mark.parametrize(("override", "message"), MISTAKES.items())
def test_a_bad_override_is_refused_by_its_name(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(GraftError, match=message) as raised:
        load_recipe(minimal, ["bench.rounds=2", override])
    assert str(raised.value).startswith(f"--set {override}: ")
    assert "minimal.toml" not in str(raised.value), "which is not to blame"


def test_a_mistake_in_the_recipe_is_not_blamed_on_an_override(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "count = 0\n")
    with pytest.raises(GraftError, match=r"minimal\.toml: \[bench\] count is 0"):
        load_recipe(minimal, ["bench.rounds=2", "splice.variant=rtn"])
    assert load_recipe(minimal, ["bench.count=2"]).bench.count == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"not a TOML file"),
        ("[model", r"not a TOML file"),
        ("x = " + "[" * 50_000, r"not a TOML file"),
        (MINIMAL + f"count = {10**400}\n", r"\[bench\] count is 1000.*expected less than"),
        ("model = 3", r"model is 3, expected a section"),
        (MINIMAL + "[models]\n", r"unknown section 'models'; there are bench, capture, heal"),
        (MINIMAL.replace('name = "m"', ""), r"\[model\] name is missing"),
        (MINIMAL + "[heal]\nloss = {}\n", r"\[heal\] loss is {}, expected at least one weight"),
        (MINIMAL + "[heal]\nloss = {tv = 0}\n", r"loss is {'tv': 0}, expected at least one weight"),
        (MINIMAL + "[heal]\nloss = {tv = -1}\n", r"\[heal\] loss is -1, expected greater .* 0"),
        (MINIMAL + "[heal]\nloss = {tv = inf}\n", r"\[heal\] loss is inf, expected a finite"),
    ],
)
def test_a_broken_recipe_is_named_once(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "broken.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(GraftError, match=rf"broken\.toml.*{message}"):
        load_recipe(path)


def test_what_is_no_file_or_no_path_is_an_error(tmp_path: Path, minimal: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(GraftError, match=r"pipe\.toml: not a file; expected a recipe"):
        load_recipe(tmp_path / "pipe.toml")
    for path in ("./a\0b", "~nobody-here/x"):
        with pytest.raises(GraftError, match=r"\[model\] base is .*: "):
            load_recipe(minimal, [f"model.base={path}"])
