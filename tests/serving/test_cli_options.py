"""Options that many commands have: the same everywhere, and wrong ones refused before any work."""

from pathlib import Path

import pytest

from .test_cli import Run, run  # noqa: F401

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
