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

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mtp_graft.checkpoint.files import read_object
from mtp_graft.checkpoint.quant_manifest import (
    CARD_NAME,
    HEAD_SHARD,
    MANIFEST_NAME,
    MANIFEST_TEXT_NAME,
    TRACE_NAME,
    Spliced,
    find_spliced,
)
from mtp_graft.errors import GraftError
from mtp_graft.stages.hub import HUB_ERRORS
from mtp_graft.stages.inputs import Progress

_LARGE = ".safetensors"
#: What is said of an answer with this status, and what to do.
_REFUSED = {
    401: ("the hub refused the token", "give another in HF_TOKEN"),
    403: ("the token may not write there", "give one that may"),
}


@dataclass(frozen=True)
class Publication:
    """What would be uploaded, and to where."""

    repo: str
    private: bool
    files: Mapping[str, Path | bytes]  # path in the repository -> file, or content made here

    def as_json(self) -> dict[str, Any]:
        """Return the JSON of `publish --dry-run`."""
        files: list[dict[str, Any]] = [
            {
                "path": name,
                "bytes": len(file) if isinstance(file, bytes) else file.stat().st_size,
                "from": None if isinstance(file, bytes) else str(file),
            }
            for name, file in self.files.items()
        ]
        total = sum(file["bytes"] for file in files)
        return {"repo": self.repo, "private": self.private, "files": files, "total_bytes": total}


def plan_publication(
    run: Path, repo: str, private: bool, card: Path, *, head_only: bool = False
) -> Publication:
    """Return what to upload: the checkpoint of the run's chosen variant, and its card.

    `head_only` leaves out the base: others graft the head onto it. The card's README.md takes the
    place of one that the checkpoint has of its base. Raises GraftError for a repository's id that
    the hub would not take, without a verification that passed, without a card, and for a card of
    another checkpoint. Needs no network.
    """
    _check_repo(repo)
    spliced = find_spliced(run)
    _check_verified(run, spliced)
    _check_card(card, spliced)
    paths = (path for path in spliced.folder.rglob("*") if path.is_file())
    relative = {path.relative_to(spliced.folder): path for path in paths}
    files: dict[str, Path | bytes] = {
        name.as_posix(): path
        for name, path in relative.items()
        if not any(part.startswith(".") for part in name.parts)
        and (not head_only or _belongs_to_head(name.as_posix()))
    }
    cards = [card / CARD_NAME, card / TRACE_NAME, *card.glob("*.png")]
    files |= {path.name: path for path in cards}
    if head_only:
        files[CARD_NAME] = _head_card(card / CARD_NAME, repo)
    return Publication(repo, private, dict(sorted(files.items())))


def _belongs_to_head(name: str) -> bool:
    own = (HEAD_SHARD, MANIFEST_NAME, MANIFEST_TEXT_NAME)
    return name in own or name.startswith(("LICENSE", "NOTICE"))


def _head_card(card: Path, repo: str) -> bytes:
    """Return the card with a paragraph that says what to do with a head alone."""
    content = ModelCard.load(card, ignore_metadata_errors=True)
    note = (
        "> This repository holds the MTP head alone. Put it on its base, which is what this card "
        f"describes without the head:\n> `mtp-graft graft BASE {repo} OUT`"
    )
    content.text = f"\n{note}\n\n{content.text.lstrip()}"
    return str(content).encode()


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise GraftError(f"--repo {repo}: {error}") from error
    if repo.count("/") != 1:
        raise GraftError(f"--repo {repo}: expected OWNER/NAME")


def _check_verified(run: Path, spliced: Spliced) -> None:
    path = run / "verify" / f"{spliced.variant}.json"
    found = read_object(path, "what verify found", "run `mtp-graft verify` first")
    if found.get("ok") is not True:
        raise GraftError(f"{path}: ok is {found.get('ok')}, expected true; splice and verify again")
    if not (run / "verify" / "manifest.json").exists():
        raise GraftError(f"{run / 'verify'}: not finished; run `mtp-graft verify` to its end")


def _check_card(card: Path, spliced: Spliced) -> None:
    cure = "run `mtp-graft card` first"
    if not (card / CARD_NAME).is_file():
        raise GraftError(f"{card / CARD_NAME}: not found; {cure}")
    about = read_object(card / TRACE_NAME, "a card's data", cure).get("checkpoint")
    if about != (here := spliced.identity()):
        raise GraftError(
            f"{card}: is about {json.dumps(about)}, the run's checkpoint is {json.dumps(here)}; "
            "run `mtp-graft card` again"
        )


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
        raise GraftError(f"{publication.repo}: {_explained(error)}") from error


def _upload(publication: Publication, api: HfApi, report: Progress) -> dict[str, Any]:
    repo, files = publication.repo, publication.files
    api.create_repo(repo, private=publication.private, exist_ok=True)
    is_private = bool(api.repo_info(repo).private)
    if publication.private and not is_private:
        raise GraftError(
            f"{repo}: exists and is public, --private was asked for; nothing was uploaded: change "
            "it on the hub, or choose another --repo"
        )
    additions = {name: CommitOperationAdd(name, file) for name, file in files.items()}
    large = [name for name in files if name.endswith(_LARGE)]
    for done, name in enumerate(large):
        report(f"publish: {name}", done, len(large))
        api.preupload_lfs_files(repo, [additions[name]], free_memory=False)
    report("publish: commit", len(large), len(large))
    commit = api.create_commit(
        repo, list(additions.values()), commit_message="Checkpoint and card, by mtp-graft publish"
    )
    return {"commit": commit.oid, "url": f"{api.endpoint}/{repo}", "private": is_private}


def _explained(error: Exception) -> str:
    """Return one line: what happened, and what to do."""
    chain = [e for e in (error, error.__cause__) if e is not None]
    answered = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    if answered is None:
        said, status = " ".join(": ".join(map(str, chain)).split()), 0
    else:
        status = answered.response.status_code
        said = f"status {status}: {answered.server_message or 'without a reason'}"
    again = "run the same command again: what has arrived is not sent twice"
    what, cure = _REFUSED.get(status, ("the upload stopped", again))
    return f"{what} ({said}); {cure}"
