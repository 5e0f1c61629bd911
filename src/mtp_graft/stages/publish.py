"""Publish: a run's checkpoint and its card, to a repository of the hub.

Files go one after another, the small ones with a single commit at the end, so that the repository
never shows half a checkpoint. `create_commit` is used rather than `upload_folder`: it takes files
from two folders without a copy of 146 GB, and makes one commit. A large file that arrived is kept
by the hub without a commit, so a call that is repeated sends what is missing: huggingface_hub asks
by SHA-256 before it sends (with Xet, by chunk), and leaves out what the last commit has.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mtp_graft.checkpoint.spliced import (
    CARD_NAME,
    TRACE_NAME,
    Spliced,
    find_spliced,
    read_object,
)
from mtp_graft.errors import GraftError
from mtp_graft.stages.hub import HUB_ERRORS
from mtp_graft.stages.inputs import Progress

_LARGE = ".safetensors"
_UNAUTHORIZED, _FORBIDDEN = 401, 403


@dataclass(frozen=True)
class Publication:
    """What would be uploaded, and to where."""

    repo: str
    private: bool
    files: Mapping[str, Path]  # path in the repository -> file

    def as_json(self) -> dict[str, Any]:
        """Return the JSON of `publish --dry-run`."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return {
            "repo": self.repo,
            "private": self.private,
            "files": [
                {"path": name, "bytes": sizes[name], "from": str(path)}
                for name, path in self.files.items()
            ],
            "total_bytes": sum(sizes.values()),
        }


def plan_publication(run: Path, repo: str, private: bool, card: Path) -> Publication:
    """Return what to upload: the checkpoint of the run's chosen variant, and its card.

    The card's README.md takes the place of one that the checkpoint has of its base. Raises
    GraftError for a repository's id that the hub would not take, without a verification that
    passed, without a card, and for a card of another checkpoint. Needs no network.
    """
    _check_repo(repo)
    spliced = find_spliced(run)
    _check_verified(run, spliced)
    _check_card(card, spliced)
    files = {
        path.relative_to(spliced.folder).as_posix(): path
        for path in sorted(spliced.folder.rglob("*"))
        if path.is_file() and not _is_hidden(path.relative_to(spliced.folder))
    }
    cards = [card / CARD_NAME, card / TRACE_NAME, *sorted(card.glob("*.png"))]
    files |= {path.name: path for path in cards}
    return Publication(repo, private, dict(sorted(files.items())))


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise GraftError(f"--repo {repo}: {error}") from error
    if repo.count("/") != 1:
        raise GraftError(f"--repo {repo}: expected OWNER/NAME")


def _check_verified(run: Path, spliced: Spliced) -> None:
    path = run / "verify" / f"{spliced.variant}.json"
    found = read_object(path, "run `mtp-graft verify` first: what is published must be verified")
    if found.get("ok") is not True:
        raise GraftError(f"{path}: ok is {found.get('ok')}, expected true; splice and verify again")
    if not (run / "verify" / "manifest.json").exists():
        raise GraftError(f"{run / 'verify'}: not finished; run `mtp-graft verify` to its end")


def _check_card(card: Path, spliced: Spliced) -> None:
    cure = "run `mtp-graft card` first"
    if not (card / CARD_NAME).is_file():
        raise GraftError(f"{card / CARD_NAME}: not found; {cure}")
    about, here = read_object(card / TRACE_NAME, cure).get("checkpoint"), spliced.identity()
    if about != here:
        raise GraftError(
            f"{card}: is about {json.dumps(about)}, the run's checkpoint is {json.dumps(here)}; "
            "run `mtp-graft card` again"
        )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def publish(publication: Publication, report: Progress) -> dict[str, Any]:
    """Upload; return `commit`, `url`, and whether the repository is `private`.

    A call that failed, or was killed, can be repeated. Raises GraftError without a token, for one
    that the hub refuses, for a public repository where a private one was asked for, and for
    whatever else ends the upload.
    """
    token = get_token()
    if token is None:
        raise GraftError(
            "no token for the hub: set HF_TOKEN, or log in with `hf auth login`; it needs to be "
            "allowed to write"
        )
    try:
        return _upload(publication, HfApi(token=token), report)
    except HUB_ERRORS as error:
        raise GraftError(_explained(publication, error)) from error


def _upload(publication: Publication, api: HfApi, report: Progress) -> dict[str, Any]:
    repo, files = publication.repo, publication.files
    api.create_repo(repo, private=publication.private, exist_ok=True)
    is_private = bool(api.repo_info(repo).private)
    if publication.private and not is_private:
        raise GraftError(
            f"{repo}: exists and is public, --private was asked for; nothing was uploaded: change "
            "it on the hub, or choose another --repo"
        )
    additions = {name: CommitOperationAdd(name, path) for name, path in files.items()}
    large = [name for name in files if name.endswith(_LARGE)]
    for done, name in enumerate(large):
        report(f"publish: {name}", done, len(large))
        api.preupload_lfs_files(repo, [additions[name]], free_memory=False)
    report("publish: commit", len(large), len(large))
    commit = api.create_commit(
        repo, list(additions.values()), commit_message="Checkpoint and card, by mtp-graft publish"
    )
    return {"commit": commit.oid, "url": f"{api.endpoint}/{repo}", "private": is_private}


def _explained(publication: Publication, error: Exception) -> str:
    """Return one line: what happened, and what to do."""
    repo, chain = publication.repo, [e for e in (error, error.__cause__) if e is not None]
    answered = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    status = answered and answered.response.status_code
    if answered is not None:
        said = f"status {status}: {answered.server_message or 'without a reason'}"
    else:
        said = " ".join(": ".join(map(str, chain)).split())
    if status == _UNAUTHORIZED:
        return f"{repo}: the hub refused the token ({said}); give another in HF_TOKEN"
    if status == _FORBIDDEN:
        return f"{repo}: the token may not write there ({said}); give one that may"
    return (
        f"{repo}: the upload stopped ({said}); run the same command again: "
        "what has arrived is not sent twice"
    )
