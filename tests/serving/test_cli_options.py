"""Options that many commands have: the same everywhere, and wrong ones refused before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import read_record
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


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_serves_with_the_profile_and_ranks_asked_for(
    run: Run,  # noqa: F811
    fake: Callable[..., None],
    tiny_model: Path,
    shared_data: Path,
    tmp_path: Path,
    name: str,
) -> None:
    """Its server dies at once: what matters is how it was started."""
    fake(record=str(tmp_path / "record"), mode="dies")
    more: list[object] = []
    if name in ("gsm8k", "humaneval", "mmlu"):
        more += ["--data-dir", shared_data]
    if name in ("humaneval", "capability"):  # nothing is judged, and not all machines have it
        layers = ("namespaces", "landlock", "seccomp", "limits")
        more += [word for layer in layers for word in ("--sandbox-without", layer)]
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
