"""Publish: a run's checkpoint and its card, to a repository of the hub, with one commit.

`create_commit` takes files from two folders without a copy of 146 GB. Repeated, it sends what is
missing: huggingface_hub asks by SHA-256 (with Xet, by chunk) what the hub has before it sends.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.files import read_object, visible_files
from mtp_graft.checkpoint.quant_manifest import CARD_NAME, TRACE_NAME, Spliced, find_spliced
from mtp_graft.errors import GraftError, translated
from mtp_graft.stages.fetch import HUB_ERRORS

_MANIFESTS = (quant_manifest.MANIFEST_NAME, quant_manifest.MANIFEST_TEXT_NAME)
#: How the names of a head's own files begin.
_OF_HEAD = (quant_manifest.HEAD_SHARD, *_MANIFESTS, "LICENSE", "NOTICE")


def publish(
    run: Path, repo: str, card: Path, *, private: bool, head_only: bool, dry_run: bool
) -> dict[str, Any]:
    """Upload the checkpoint of the run's chosen variant, and its card; return what was uploaded.

    `head_only` leaves out the base: others graft the head onto it. A dry run needs no network. A
    call that failed, or was killed, can be repeated. Raises GraftError for an id that the hub would
    not take, without a passed verification, this checkpoint's card or a token, for a public
    repository where a private one was asked for, and for whatever else ends the upload.
    """
    with translated(f"--repo {repo}: not an id", HFValidationError):
        validate_repo_id(repo)
    if repo.count("/") != 1:
        raise GraftError(f"--repo {repo}: expected OWNER/NAME")
    files = find_files(run, repo, card, head_only=head_only)
    listed: list[dict[str, Any]] = [
        {"path": name, "bytes": len(file), "from": None}
        if isinstance(file, bytes)
        else {"path": name, "bytes": file.stat().st_size, "from": str(file)}
        for name, file in files.items()
    ]
    total = sum(file["bytes"] for file in listed)
    result = {"repo": repo, "private": private, "files": listed, "total_bytes": total}
    return {**result, "dry_run": dry_run, **({} if dry_run else _upload(repo, private, files))}


def find_files(run: Path, repo: str, card: Path, *, head_only: bool) -> dict[str, Path | bytes]:
    """Return path -> file, or content; the card's README.md takes the place of the base's."""
    spliced = find_spliced(run)
    _check(run, card, spliced)
    files: dict[str, Path | bytes] = {**visible_files(spliced.folder)}
    if head_only:
        files = {name: files[name] for name in files if name.startswith(_OF_HEAD)}
    cards = [card / CARD_NAME, card / TRACE_NAME, *card.glob("*.png")]
    files |= {path.name: path for path in cards}
    if head_only:
        page = ModelCard.load(card / CARD_NAME, ignore_metadata_errors=True)
        what = "> This repository holds the MTP head alone. Put it on the base that this card names"
        page.text = f"\n{what}:\n> `mtp-graft graft BASE {repo} OUT`\n\n{page.text.lstrip()}"
        files[CARD_NAME] = str(page).encode()
    return dict(sorted(files.items()))


def _check(run: Path, card: Path, spliced: Spliced) -> None:
    """Raise GraftError unless the checkpoint is verified, and the card is about it."""
    path = run / "verify" / f"{spliced.variant}.json"
    found = read_object(path, "what verify found", "run `mtp-graft verify` first")
    if found.get("ok") is not True:
        raise GraftError(f"{path}: ok is {found.get('ok')}, expected true; splice and verify again")
    if not (run / "verify" / "manifest.json").exists():
        raise GraftError(f"{run / 'verify'}: not finished; run `mtp-graft verify` to its end")
    cure = "run `mtp-graft card` first"
    if not (card / CARD_NAME).is_file():
        raise GraftError(f"{card / CARD_NAME}: not found; {cure}")
    about = read_object(card / TRACE_NAME, "a card's data", cure).get("checkpoint")
    if about != (here := spliced.identity()):
        said = f"is about {json.dumps(about)}, the run's checkpoint is {json.dumps(here)}"
        raise GraftError(f"{card}: {said}; run `mtp-graft card` again")


def _upload(repo: str, private: bool, files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """Return `commit`, `url`, and whether the repository is `private`."""
    if (token := get_token()) is None:
        cure = "set HF_TOKEN, or log in with `hf auth login`; it needs to be allowed to write"
        raise GraftError(f"no token for the hub: {cure}")
    api = HfApi(token=token)
    added = [CommitOperationAdd(name, file) for name, file in files.items()]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        is_private = bool(api.repo_info(repo).private)
        if private and not is_private:
            found = "exists and is public, --private was asked for; nothing was uploaded"
            raise GraftError(f"{repo}: {found}: change it on the hub, or choose another --repo")
        commit = api.create_commit(repo, added, commit_message="Checkpoint and card, by mtp-graft")
    except HUB_ERRORS as error:
        found = f"the upload stopped ({' '.join(str(error).split())})"
        cure = "check that HF_TOKEN may write there, and run again: nothing is sent twice"
        raise GraftError(f"{repo}: {found}; {cure}") from error
    return {"commit": commit.oid, "url": f"{api.endpoint}/{repo}", "private": is_private}
