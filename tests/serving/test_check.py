"""`serve --check`, and options of `serve` that do not go together."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_graft.serving import server

from .conftest import read_record, wait_gone

Run = Callable[..., tuple[int, str, str]]
Fake = Callable[..., None]


@pytest.mark.parametrize("border", [0.2, 0.6])
def test_serve_check_starts_measures_stops_and_fails_a_head_that_is_not_the_models(
    run_command: Run,
    fake: Fake,
    grafted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    border: float,
) -> None:
    monkeypatch.setattr(server, "MIN_ACCEPTANCE", border)  # the stand-in's head has 0.5
    fake(record=str(tmp_path / "record"))
    status, out, errors = run_command("serve", grafted, "--check", "--port", 0, "--json", "-")
    result = json.loads(out)
    assert result["ok"] is (status == 0) is (border < 0.5)
    assert result["threshold"] == border
    assert ("the head is not the model's" in errors) is not result["ok"]
    assert wait_gone(read_record(tmp_path / "record")["pids"]) == []


@pytest.mark.parametrize(
    ("status", "words", "message"),
    [
        (1, "--check --k 0", "--check without drafts"),
        (1, "--gpu H200", "a CPU build"),
        (1, "--profile 524k --nnodes 2 --dry-run", "a CPU build"),
        (2, "--check --dry-run", "give one of"),
        (2, "--profile none --gpu H200 --dry-run", "need a --profile"),
        (2, "--profile none --nnodes 2", "need a --profile"),
        (2, "--profile 524k --count 2", "--count needs --gpu"),
    ],
)
def test_what_cannot_be_served_or_checked_is_refused_before_anything_starts(
    run_command: Run, fake: Fake, grafted: Path, status: int, words: str, message: str
) -> None:
    fake(record=f"{grafted}.record")
    ended, out, errors = run_command("serve", grafted, *words.split())
    assert (ended, out) == (status, "")
    assert message in errors
    assert not Path(f"{grafted}.record").exists()
