"""`mtp-graft publish`, huggingface_hub's own client speaking to a stand-in of the hub."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mtp_graft import cli
from mtp_graft.bench.card import write_card
from run_folder import HEAD, NAME, whole_run, write
from upload_stand_in import TOKEN, UploadHub, upload_hub

REPO = "someone/DeepSeek-V4-Flash-MTP"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its card, not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    whole_run(run)
    write_card(run, run / "card")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run with its card, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with upload_hub() as found:
        yield found


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Publish = Callable[..., Done]


@pytest.fixture
def publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Publish:
    """Return a function that runs the command in this process."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    # Xet's own server cannot be stood in for; the other protocol has the same guarantees.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def call(run: Path, hub: UploadHub | None, *options: str, token: str | None = TOKEN) -> Done:
        # On port 9 nobody listens.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url if hub else "http://127.0.0.1:9")
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        arguments = ["publish", str(run), "--repo", REPO, *options]
        monkeypatch.setattr(sys, "argv", ["mtp-graft", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        code = ended.value.code
        assert isinstance(code, int)
        return Done(code, *capfd.readouterr())

    return call


def failure(done: Done) -> str:
    """Return the one line that a failed command printed."""
    assert done.returncode == 1, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("error: "))


def checkpoint(run: Path) -> Path:
    return run / "splice/gptq" / NAME


def test_dry_run_lists_all_that_would_be_uploaded_without_network_or_token(
    finished: Path, publish: Publish
) -> None:
    done = publish(finished, None, "--dry-run", "--private", "--json", "-", token=None)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    sizes = {file["path"]: file["bytes"] for file in result["files"]}
    pictures = {path.name for path in (finished / "card").glob("*.png")}
    assert pictures
    names = {path.name for path in checkpoint(finished).iterdir()}
    assert set(sizes) == names | {"README.md", "card.json"} | pictures
    assert sizes[HEAD] == (checkpoint(finished) / HEAD).stat().st_size
    assert result["total_bytes"] == sum(sizes.values())
    assert (result["repo"], result["private"], result["dry_run"]) == (REPO, True, True)
    assert f"{result['total_bytes']:,} bytes to be uploaded to {REPO} (private)" in done.stderr


def test_upload_brings_every_byte_in_one_commit_and_the_cards_readme_wins(
    finished: Path, hub: UploadHub, publish: Publish, tmp_path: Path
) -> None:
    done = publish(finished, hub, "--json", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    assert len(hub.commits) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    for file in result["files"]:
        assert hub.content(REPO, file["path"]) == Path(file["from"]).read_bytes()
    assert hub.content(REPO, "README.md") == (finished / "card/README.md").read_bytes()
    assert (checkpoint(finished) / "README.md").exists(), "there was another one to win over"
    assert hub.content(REPO, "LICENSE") == (checkpoint(finished) / "LICENSE").read_bytes()
    assert not hub.private[REPO] and not result["private"]


def test_a_private_repository_is_made_private(
    finished: Path, hub: UploadHub, publish: Publish
) -> None:
    assert publish(finished, hub, "--private").returncode == 0
    assert hub.private[REPO]


def test_private_files_do_not_go_to_a_public_repository_that_exists(
    finished: Path, hub: UploadHub, publish: Publish
) -> None:
    hub.private[REPO], hub.files[REPO] = False, {}
    assert "exists and is public" in failure(publish(finished, hub, "--private"))
    assert not hub.objects


def test_a_repeated_upload_sends_and_commits_nothing(
    finished: Path, hub: UploadHub, publish: Publish
) -> None:
    for _ in range(2):
        assert publish(finished, hub).returncode == 0
    assert len(hub.commits) == 1
    assert set(hub.puts.values()) == {1}


def test_a_rejected_token_is_named_and_nothing_is_sent(
    finished: Path, hub: UploadHub, publish: Publish
) -> None:
    message = failure(publish(finished, hub, token="hf_wrong"))
    assert "Invalid credentials" in message and "check that HF_TOKEN may write" in message
    assert "hf_wrong" not in message
    assert not hub.objects and not hub.private


def test_a_token_that_may_not_write_is_named(
    finished: Path, hub: UploadHub, publish: Publish
) -> None:
    hub.read_only = True
    assert "check that HF_TOKEN may write there" in failure(publish(finished, hub))


def test_a_failed_commit_is_one_error_and_the_next_call_sends_nothing_twice(
    finished: Path, hub: UploadHub, publish: Publish
) -> None:
    hub.failing["/commit/"] = 1
    message = failure(publish(finished, hub))
    assert "the upload stopped" in message and "run the same command again" in message
    assert not hub.commits
    assert publish(finished, hub).returncode == 0
    assert len(hub.commits) == 1
    assert set(hub.puts.values()) == {1}


def test_a_hub_that_cannot_be_reached_is_one_error(finished: Path, publish: Publish) -> None:
    message = failure(publish(finished, None))
    assert "the upload stopped" in message and "run the same command again" in message


def test_without_a_token_it_says_how_to_get_one(
    finished: Path, hub: UploadHub, publish: Publish
) -> None:
    message = failure(publish(finished, hub, token=None))
    assert "no token for the hub" in message and "hf auth login" in message
    assert not hub.asked


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda run: (run / "verify/gptq.json").unlink(), "run `mtp-graft verify` first"),
        (lambda run: write(run / "verify/gptq.json", {"ok": False}), "ok is False, expected true"),
        (lambda run: (run / "verify/manifest.json").unlink(), "run `mtp-graft verify` to its end"),
        (lambda run: (run / "card/README.md").unlink(), "run `mtp-graft card` first"),
        (lambda run: (run / "card/card.json").unlink(), "run `mtp-graft card` first"),
        (
            lambda run: write(run / "card/card.json", {"checkpoint": {"variant": "rtn"}}),
            "run `mtp-graft card` again",
        ),
        (lambda run: (run / "splice/manifest.json").unlink(), "run `mtp-graft splice` first"),
    ],
)
def test_what_is_not_finished_is_not_published(
    break_: Any, message: str, run: Path, publish: Publish
) -> None:
    break_(run)
    assert message in failure(publish(run, None, "--dry-run"))


@pytest.mark.parametrize("repo", ["noowner", "a/b/c", "some one/x", "someone/x--y", "/x"])
def test_a_malformed_repository_is_refused(repo: str, finished: Path, publish: Publish) -> None:
    done = publish(finished, None, "--dry-run", "--repo", repo)
    assert f"--repo {repo}" in failure(done)
