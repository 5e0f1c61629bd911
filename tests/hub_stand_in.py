"""A stand-in for the hub: the few endpoints that a checkpoint's download needs, on this machine."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"  # what is kept in large file storage


@dataclass
class StandInHub:
    """Repositories by id, as file name -> bytes; and what was asked for."""

    repositories: dict[str, dict[str, bytes]]
    url: str = ""
    asked: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, first byte
    chunk_s: float = 0.0  # pause between two chunks of a large file
    chunk: int = 4096
    cut_at: int | None = None  # a large file's answer ends here, once
    wrong: set[str] = field(default_factory=set)  # large files that come with another last byte
    ignores_ranges: bool = False

    def downloads(self, name: str) -> list[int]:
        """Return the first byte of every download of a file, to its end."""
        return [
            first for method, path, first in self.asked if method == "GET" and path.endswith(name)
        ]

    def model(self, repo: str) -> dict[str, Any]:
        siblings = []
        for name, content in self.repositories[repo].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "b"}
            if name.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 1}
            siblings.append(entry)
        return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False}


@contextmanager
def stand_in_hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[StandInHub]:
    """Serve the repositories inside the block."""
    hub = StandInHub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            start, _, end = (self.headers.get("Range") or "bytes=0-")[6:].partition("-")
            first, last = int(start), int(end) if end else None
            # Of a range with an end, only the beginning of a file is wanted.
            hub.asked.append((self.command if last is None else "GET a part", path, first))
            parts = path.strip("/").split("/")
            repo = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
            if repo not in hub.repositories:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
            elif parts[0] == "api":
                self.send(200, json.dumps(hub.model(repo)).encode(), {}, with_body)
            else:
                files, name = hub.repositories[repo], "/".join(parts[4:])
                self.send_file(files, name, slice(first, last and last + 1), with_body)

        def send_file(
            self, files: dict[str, bytes], name: str, wanted: slice, with_body: bool
        ) -> None:
            if name not in files:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
                return
            content = files[name]
            digest = hashlib.sha256 if name.endswith(LARGE) else hashlib.sha1
            headers = {"ETag": f'"{digest(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if name in hub.wrong:
                content = content[:-1] + bytes([content[-1] ^ 1])
            partial = "Range" in self.headers and not hub.ignores_ranges
            self.send(
                206 if partial else 200, content[wanted] if partial else content, headers, with_body
            )

        def send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if not with_body:
                return
            cut, slow = None, len(body) > hub.chunk
            if hub.cut_at is not None and len(body) > hub.cut_at:
                cut, hub.cut_at = hub.cut_at, None
            for start in range(0, len(body[:cut]), hub.chunk):
                self.wfile.write(body[:cut][start : start + hub.chunk])
                time.sleep(hub.chunk_s if slow else 0)
            if cut is not None:
                self.close_connection = True
                self.connection.close()

        def log_message(self, format: str, *args: object) -> None:
            """Stay quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def in_place_of_the_hub(
    repositories: dict[str, dict[str, bytes]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StandInHub]:
    """Let this process take the repositories for the hub inside the block."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with stand_in_hub(repositories) as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


def as_repository(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint's folder as a repository has them."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
