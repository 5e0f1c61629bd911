"""Recipes: read exactly, or refused with the name of what is wrong."""

import os
from pathlib import Path

import pytest

from mtp_graft.errors import GraftError
from mtp_graft.recipe import load_recipe

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
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["splice.variant=rtn", 'splice.variant="bf16"', "quantize.damp=1"]
    overrides += ["serve.extra_args=['--x', '--y=1']", "bench.prompts=here.jsonl"]
    recipe = load_recipe(minimal, overrides)
    assert recipe.splice.variant == "bf16"
    assert recipe.quantize.damp == 1.0 and isinstance(recipe.quantize.damp, float)
    assert recipe.serve.extra_args == ("--x", "--y=1")
    assert recipe.bench.prompts == str(tmp_path / "here.jsonl")  # typed in this folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("splice.varient=rtn", r"\[splice\]: unknown key 'varient'; there are .*variant"),
        ("splise.variant=rtn", r"--set splise.*unknown section 'splise'; there are .*splice"),
        ("splice.variant=int4", r"\[splice\] variant is 'int4', expected 'rtn', 'gptq'"),
        ("splice.copy=1", r"\[splice\] copy is 1, expected a valid boolean"),
        ("bench.count=true", r"\[bench\] count is True, expected a valid integer"),
        ("bench.count=0", r"\[bench\] count is 0, expected greater than or equal to 1"),
        ("quantize.damp=-0.1", r"damp is -0.1, expected greater"),
        ("quantize.variants=rtn", r"variants is 'rtn', expected a valid list"),
        ('quantize.variants=["rtn"]', r"variant 'gptq' is to be spliced"),
        ("model.base=base", r"base is 'base', expected a hub id.*or a folder"),
        ("model.name=../x", r"name is '\.\./x'"),
        (f"model.name={'x' * 300}", r"expected up to 60 letters"),
        (r'serve.extra_args=["a\u0000"]', r"extra_args is .*, expected text without a NUL"),
        ("bench.prompts=hub:../x:y", r"'hub:\.\./x:y', expected a file or hub:owner"),
        ("variant=rtn", r"--set variant=rtn: expected section\.key=value"),
        ("bench.max_tokens=4000", r"\[bench\] max_tokens is 4000, expected less"),
        ("capture.new_tokens=2000", r"\[capture\] max_model_len is 2048, expected at least 2513"),
        ("quantize.damp=nan", r"damp is nan, expected a finite number"),
        ("capture.taps=[41, 40]", r"taps is \[41, 40\], expected layers in ascending order"),
    ],
)
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
        (MINIMAL + "num_prompts = 8\n", r"\[bench\]: unknown key 'num_prompts'"),
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


def test_bundled_recipes_are_valid(repo_root: Path) -> None:
    tiny, _ = (load_recipe(repo_root / f"recipes/{name}.toml") for name in ("tiny", "dsv4-flash"))
    assert Path(tiny.model.base) == repo_root / "models" / "tiny-dsv4" / "base"


def test_what_is_no_file_or_no_path_is_an_error(tmp_path: Path, minimal: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(GraftError, match=r"pipe\.toml: not a file; expected a recipe"):
        load_recipe(tmp_path / "pipe.toml")
    for path in ("./a\0b", "~nobody-here/x"):
        with pytest.raises(GraftError, match=r"\[model\] base is .*: "):
            load_recipe(minimal, [f"model.base={path}"])
