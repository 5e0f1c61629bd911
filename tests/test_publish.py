"""`mtp-graft publish`: what it uploads, and what it refuses; huggingface_hub's part is a fake."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
from huggingface_hub import HfApi, constants

from mtp_graft.stages import publish as stage
from run_folder import HEAD, NAME, write

REPO = "someone/DeepSeek-V4-Flash-MTP"
Publish = Callable[..., Any]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for huggingface_hub's `HfApi`; the repository is public unless a test says so."""
    hub = create_autospec(HfApi, instance=True, endpoint="https://hub")
    hub.repo_info.return_value.private = False
    hub.create_commit.return_value.oid = "1" * 40
    monkeypatch.setattr(stage, "HfApi", lambda token: hub)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return hub


@pytest.fixture
def publish(mtp_graft: Callable[..., Any]) -> Publish:
    """Return a function that runs the command: its JSON, or the error that it printed."""
    return lambda run, *options: mtp_graft("publish", run, "--repo", REPO, *options)


def test_dry_run_lists_all_that_would_be_uploaded_without_a_token(
    finished: Path, publish: Publish
) -> None:
    result = publish(finished, "--dry-run", "--private")
    sizes = {file["path"]: file["bytes"] for file in result["files"]}
    checkpoint, pictures = (finished / "splice/gptq" / NAME, (finished / "card").glob("*.png"))
    names = {path.name for path in checkpoint.iterdir()} | {path.name for path in pictures}
    assert set(sizes) == names | {"README.md", "card.json"}
    assert sizes[HEAD] == (checkpoint / HEAD).stat().st_size
    assert result["total_bytes"] == sum(sizes.values())
    assert (result["repo"], result["private"], result["dry_run"]) == (REPO, True, True)


def test_upload_is_one_commit_of_every_byte_and_the_cards_readme_wins(
    finished: Path, hub: Mock, publish: Publish
) -> None:
    result = publish(finished)
    hub.create_commit.assert_called_once()
    repo, added = hub.create_commit.call_args.args
    commit = {file.path_in_repo: Path(file.path_or_fileobj) for file in added}
    assert commit == {file["path"]: Path(file["from"]) for file in result["files"]}
    assert commit["README.md"] == finished / "card/README.md"
    assert (finished / "splice/gptq" / NAME / "README.md").exists(), "there was one to win over"
    hub.create_repo.assert_called_once_with(REPO, private=False, exist_ok=True)
    assert repo == REPO and not result["private"]
    assert (result["commit"], result["url"]) == ("1" * 40, f"https://hub/{REPO}")


def test_private_files_go_to_a_private_repository_alone(
    finished: Path, hub: Mock, publish: Publish
) -> None:
    assert "exists and is public" in publish(finished, "--private")
    hub.create_commit.assert_not_called()
    hub.repo_info.return_value.private = True
    assert publish(finished, "--private")["private"]
    hub.create_repo.assert_called_with(REPO, private=True, exist_ok=True)


def test_what_ends_the_upload_is_one_error(finished: Path, hub: Mock, publish: Publish) -> None:
    hub.create_commit.side_effect = RuntimeError("xet")
    assert f"{REPO}: the upload stopped (xet)" in publish(finished)


def test_without_a_token_it_says_how_to_get_one(
    finished: Path, hub: Mock, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "no token for the hub: set HF_TOKEN" in publish(finished)
    hub.create_repo.assert_not_called()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "verify/gptq.json").unlink(), "run `mtp-graft verify` first"),
        (lambda run: write(run / "verify/gptq.json", {"ok": False}), "ok is False, expected true"),
        (lambda run: (run / "verify/manifest.json").unlink(), "run `mtp-graft verify` to its end"),
        (lambda run: (run / "card/README.md").unlink(), "run `mtp-graft card` first"),
        (lambda run: write(run / "card/card.json", {"checkpoint": {}}), "`mtp-graft card` again"),
        (lambda run: (run / "splice/manifest.json").unlink(), "run `mtp-graft splice` first"),
    ],
)
def test_what_is_not_finished_is_not_published(
    damage: Callable[[Path], object], message: str, finished: Path, publish: Publish, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    damage(run)
    assert message in publish(run, "--dry-run")


@pytest.mark.parametrize("repo", ["noowner", "a/b/c", "some one/x"])
def test_a_malformed_repository_is_refused(repo: str, finished: Path, publish: Publish) -> None:
    assert f"--repo {repo}" in publish(finished, "--dry-run", "--repo", repo)
