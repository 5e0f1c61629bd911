import json
import shlex
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from mtp_graft import pipeline
from mtp_graft.cli.app import app
from mtp_graft.cli.pipeline import STAGES
from mtp_graft.pipeline import find_bundled_recipe
from mtp_graft.pipeline import run as stages
from mtp_graft.recipe import Recipe
from mtp_graft.serving import server
from mtp_graft.serving.server import Report

from .conftest import install, only_from, read_record, wait_gone

Run = Callable[..., tuple[int, str, str]]
RECIPE = find_bundled_recipe()
TINY = RECIPE.parents[1] / "models" / "tiny-dsv4" / "base"
MISTAKES = tomllib.loads((Path(__file__).parents[1] / "mistakes.toml").read_text())


@pytest.fixture
def run(vllm: object, run_command: Run) -> Run:
    return run_command


def test_dry_run_prints_command_and_json(run: Run, vllm: tuple[str, ...], grafted: Path) -> None:
    words = ("serve", grafted, "--dry-run", "--api-key", "s3cret")
    extra = ("--", "--seed", 7)
    status, text, errors = run(*words, *extra)
    assert (status, errors) == (0, "")
    *exports, command = [line for line in text.splitlines() if not line.startswith("#")]
    result = json.loads(run(*words, "--json", "-", *extra)[1])
    assert shlex.split(command) == result["argv"]
    assert result["argv"][: len(vllm) + 1] == [*vllm, str(grafted)]
    assert result["argv"][-2:] == ["--seed", "7"]
    assert exports == [f"export {k}={shlex.quote(v)}" for k, v in result["env"].items()]
    assert result["env"]["VLLM_API_KEY"] == "***" and "s3cret" not in text


def test_no_drafting_and_listening_beyond_loopback_are_told(run: Run, base: Path) -> None:
    status, out, _ = run("serve", base, "--dry-run", "--profile", "none")
    assert status == 0 and out.startswith("# - no drafting: the checkpoint has no head")

    def errors(*words: str) -> str:
        return run("serve", base, "--dry-run", "--host", *words)[2]

    assert "anyone may use it" in errors("0.0.0.0")
    for words in (("0.0.0.0", "--api-key", "k"), ("127.0.0.2",), ("::1",), ("localhost",)):
        assert errors(*words) == ""


@pytest.mark.parametrize("flag", ["--host", "--api_key", "--max_model_len=64", "-tp", "--model"])
def test_a_flag_of_serves_is_refused_after_the_dashes(run: Run, base: Path, flag: str) -> None:
    status, out, errors = run("serve", base, "--dry-run", "--", "--seed", 7, flag, 2)
    assert (status, out) == (2, "")
    name = flag.partition("=")[0].replace("_", "-")
    assert f"{name} after --: mtp-graft decides it" in errors


def test_cpu_needs_no_cpu_build(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_from(site := tmp_path / "other" / "site-packages", monkeypatch)
    for installed in (None, "0.33.0"):
        if installed is not None:
            install(site, "vllm", installed)
        status, out, errors = run("serve", TINY, "--gpu", "cpu", "--dry-run", "--json", "-")
        assert status == 0, errors
        result = json.loads(out)
        assert (result["profile"], result["hardware"]) == ("128k", "CPU")
        assert "--enforce-eager" in result["argv"]


@pytest.mark.parametrize("border", [0.2, 0.6])
def test_serve_check_starts_measures_stops_and_fails_a_head_that_is_not_the_models(
    run: Run, fake: Any, grafted: Path, monkeypatch: pytest.MonkeyPatch, border: float
) -> None:
    monkeypatch.setattr(server, "MIN_ACCEPTANCE", border)  # the stand-in's head has 0.5
    fake(record="record")
    words = ("serve", grafted, "--check", "--port", 0, "--json", "-", "--log", "check.log")
    status, out, errors = run(*words)
    assert Path("check.log").is_file()
    result = json.loads(out)
    assert result["ok"] is (status == 0) is (border < 0.5)
    assert result["threshold"] == border
    assert ("the head is not the model's" in errors) is not result["ok"]
    assert wait_gone(read_record(Path("record"))["pids"]) == []


RESULT: dict[str, Any] = {
    **{"drafter": "mtp", "acceptance": 0.75, "k": 2},
    **{"acceptance_by_position": [0.8, 0.875], "acceptance_length": 2.5},
    **{"greedy_identical": True, "divergences": []},
    "acceptance_served": {"gptq": 0.75, "rtn": 0.5},
    "acceptance_offline": {"gptq": 0.7421, "rtn": 0.5, "bf16": 0.76},
    "intervals_served": {"gptq": [0.73, 0.77], "rtn": [0.48, 0.52]},
    **{"decode_tok_s": {"base": 20.0, "mtp": 30.0}, "seconds": {"bench": 1.0}},
}
Asked = list[dict[str, Any]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    """What `run_pipeline` is asked for; it does nothing but return RESULT."""
    calls: Asked = []

    def run_pipeline(recipe: Recipe, folder: Path, report: Any, stages: Any, again: bool) -> Any:
        calls.append({"recipe": recipe, "run": folder, "stages": tuple(stages), "again": again})
        report("bench: decode, 1 s", 0, 0)
        report("bench: decode, 2 s", 0, 0)
        page = tmp_path / "report.html"
        page.touch()
        return {**RESULT, "checkpoint": str(tmp_path / "nowhere"), "report": str(page)}

    monkeypatch.setattr(stages, "run_pipeline", run_pipeline)
    return calls


def test_demo_runs_every_stage_of_its_recipe(run: Run, asked: Asked, tmp_path: Path) -> None:
    json_file = tmp_path / "demo.json"
    status, out, errors = run("demo", "--run", tmp_path / "run", "--json", json_file)
    assert status == 0, errors
    [call] = asked
    assert call["recipe"].model.name == "tiny-dsv4-mtp"
    assert (call["run"], call["stages"]) == (tmp_path / "run", pipeline.STAGES)
    assert call["again"] is False
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert ["gptq", "74.2 %", "75.0 %", "73.0 to 77.0 %"] in rows
    assert "served, k = 2: accepted by position 80.0, 87.5 % (each given the ones before)" in out
    assert ["bf16", "76.0 %", "–", "–"] in rows
    assert "decode: base 20.0 tok/s, with MTP 30.0 tok/s (1.50 times)" in out
    assert "identical on every prompt" in out
    assert f"report: {tmp_path / 'report.html'}" in out
    assert "nowhere" not in out, "a checkpoint that does not exist is not offered"
    assert json.loads(json_file.read_text())["acceptance"] == 0.75
    assert errors == "bench: decode\n", "a line a step, not one a second"


@pytest.mark.parametrize(
    ("arguments", "stages", "again"),
    [
        ((), pipeline.STAGES, False),
        (("--only", "score"), ("score",), False),
        (("--from", "verify"), ("verify", "bench", "report"), True),
    ],
)
def test_asked_stages_run(run: Run, asked: Asked, arguments: Any, stages: Any, again: bool) -> None:
    settings = ("--set", "splice.variant=bf16", "--set", "bench.rounds=7")
    status, out, errors = run("run", RECIPE, *arguments, *settings, "--json", "-")
    assert status == 0, errors
    assert json.loads(out)["acceptance"] == 0.75 and "74.2 %" in errors
    [call] = asked
    assert (call["stages"], call["again"]) == (stages, again)
    assert call["run"] == Path("runs/tiny"), "named after the recipe"
    assert (call["recipe"].splice.variant, call["recipe"].bench.rounds) == ("bf16", 7)


def test_a_dry_run_shows_all_and_does_nothing(run: Run, asked: Asked, tmp_path: Path) -> None:
    command = ("demo", "--run", tmp_path / "run", "--dry-run")
    status, out, errors = run(*command, "--json", "-")
    assert status == 0
    plan = json.loads(out)
    assert plan["run"] == str(tmp_path / "run")
    assert plan["stages"] == [stage for stage in pipeline.STAGES if stage != "heal"]
    assert plan["recipe"]["capture"]["new_tokens"] == 96
    assert "bytes_to_download" in errors and "residuals, BF16" in errors and "room: " in errors
    status, out, errors = run(*command, "--set", "model.base=./gone")
    assert status == 1 and out.endswith("not known therefore\n") and "gone: not a fold" in errors
    status, out, errors = run(*command, "--set", "quantize.group_size=64")
    assert status == 1 and "bytes_to_download" in out and "error: quantize.group_size" in errors
    assert asked == [] and not (tmp_path / "run").exists()


def test_a_stage_has_its_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    calls: list[tuple[Path, str]] = []

    def run_stage(_recipe: Recipe, folder: Path, stage: str, _report: Report) -> dict[str, Any]:
        calls.append((folder, stage))
        return {"stage": stage}

    monkeypatch.setattr(stages, "run_stage", run_stage)
    for stage in STAGES:
        status, out, errors = run(stage, RECIPE, "--run", folder, "--json", "-")
        assert status == 0 and json.loads(out) == {"stage": stage}
        assert f"{stage}: done, in" in errors
    assert calls == [(folder, stage) for stage in STAGES]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES["usage"].items())
def test_wrong_usage_is_status_2_and_says_why(run: Run, arguments: str, message: str) -> None:
    named = {"RECIPE": RECIPE, "MODEL": TINY}
    status, out, errors = run(*(named.get(word, word) for word in arguments.split()))
    assert (status, out) == (2, "")
    assert message in " ".join(errors.replace("│", " ").split())


@pytest.mark.parametrize(("arguments", "message"), MISTAKES["commands"].items())
def test_a_mistake_is_one_message(run: Run, grafted: Path, arguments: str, message: str) -> None:
    Path("file").touch()
    (claim := Path("old/capture/config.json")).parent.mkdir(parents=True)
    claim.write_text('{"max_prompt_tokens": 512, "new_tokens": 256}')  # as 0.1 wrote it
    named = {"RECIPE": RECIPE, "FILE": Path("file"), "OLD": Path("old"), "GRAFTED": grafted}
    status, out, errors = run(*(named.get(word, word) for word in arguments.split()))
    assert (status, out) == (1, "")
    lines = errors.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
    assert message in errors and "Traceback" not in errors
    assert [*Path("old").rglob("*")] == [claim.parent, claim]


ROOT: Any = typer.main.get_command(app)
EVERY = [(name,) for name in ROOT.commands if name != "bench"]
EVERY += [("bench", name) for name in ROOT.commands["bench"].commands]
REQUIRED = {"bench": ["--checkpoint", "x"], "publish": ["x", "--repo", "a/b"], "demo": []}
REQUIRED |= {"graft": ["x", "y", "z"], "serve": ["x", "--check"]}


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_an_unwritable_result_is_refused(run: Run, words: tuple[str, ...], tmp_path: Path) -> None:
    needed = REQUIRED.get(words[0], ["x"])
    status, out, errors = run(*words, *needed, "--json", "nowhere/x.json")
    assert (status, out) == (1, "")
    assert errors == "error: nowhere/x.json: No such file or directory\n"
    assert list(tmp_path.glob("runs")) == []


def test_looking_whether_a_result_can_be_written_leaves_no_file(run: Run, tmp_path: Path) -> None:
    there, new = tmp_path / "there.json", tmp_path / "new.json"
    there.write_text("of an earlier run")
    for file in (there, new):
        assert run("quantize", RECIPE, "--run", tmp_path / "run", "--json", file)[0] == 1
    assert there.read_text() == "of an earlier run" and not new.exists()


def test_version_says_what_is_installed(run: Run) -> None:
    status, out, _ = run("--version")
    assert status == 0
    assert f"mtp-graft {version('mtp-graft')}" in out.splitlines()
