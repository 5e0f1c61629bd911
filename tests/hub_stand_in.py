"""A stand-in for the hub: the few endpoints that a checkpoint's download needs, on this machine."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import http_stand_in

BASE, UPSTREAM = "quantizer/base", "maker/upstream"  # the bundled model's two repositories
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"  # what is kept in large file storage


@dataclass
class StandInHub:
    """Repositories by id, as file name -> bytes; and what was asked for."""

    repositories: dict[str, dict[str, bytes]]
    asked: list[tuple[str, str]] = field(default_factory=list)  # method, path
    wrong: set[str] = field(default_factory=set)  # large files that come with another last byte
    #: Headers of a 429 to the first request of each kind, if any.
    busy: dict[str, str] | None = None

    def downloads(self, name: str) -> int:
        """Return how often a file was downloaded; a part of it does not count."""
        return sum(method == "GET" and path.endswith(name) for method, path in self.asked)

    def change(self, repo: str, file: str, change: Callable[[Any], object]) -> None:
        content = json.loads(self.repositories[repo][file])
        change(content)
        self.repositories[repo][file] = json.dumps(content).encode()

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        parts = path.strip("/").removeprefix("datasets/").split("/")
        is_api = parts[0] == "api"
        repo = "/".join(parts[2:4] if is_api else parts[:2])
        if repo not in self.repositories:
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        files = self.repositories[repo]
        if is_api and "tree" in parts:
            return 200, json.dumps([entry(*file) for file in files.items()]).encode(), {}
        if is_api:
            info = {"id": repo, "sha": COMMIT, "siblings": [], "private": False}
            return 200, json.dumps(info).encode(), {}
        name = "/".join(parts[4:])
        if name not in files:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        content = files[name]
        headers = {"ETag": f'"{etag(name, content)}"', "X-Repo-Commit": COMMIT}
        if name in self.wrong:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return 200, content, headers


def etag(name: str, content: bytes) -> str:
    digest = hashlib.sha256 if name.endswith(LARGE) else hashlib.sha1
    return digest(content).hexdigest()


def entry(name: str, content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": "b"}
    if name.endswith(LARGE):
        found["lfs"] = {"oid": etag(name, content), "size": len(content), "pointerSize": 1}
    return found


@contextmanager
def in_place_of_the_hub(
    repositories: dict[str, dict[str, bytes]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StandInHub]:
    """Let this process take the repositories for the hub inside the block."""
    hub = StandInHub(repositories)

    class Handler(http_stand_in.Handler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked = self.headers.get("Range")
            request = (f"{self.command} a part" if asked else self.command, path)
            status, body, headers = hub.answer(path)
            if hub.busy is not None and request not in hub.asked:
                status, body, headers = 429, b"later", hub.busy
            hub.asked.append(request)
            if asked and status == 200:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                status, body = 206, body[int(first) : int(last) + 1 if last else None]
            self.reply(status, body, headers.items())

        do_HEAD = do_GET

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http_stand_in.serving(Handler) as url:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def as_repository(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint's folder as a repository has them."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
