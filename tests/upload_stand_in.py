"""A stand-in for the hub's upload: repositories, large files by hash, and commits."""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"
LARGE = (".safetensors", ".png")


@dataclass
class UploadHub:
    """What arrived, and what is to go wrong."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)  # by repository
    files: dict[str, dict[str, str]] = field(default_factory=dict)  # path -> hash, by repository
    objects: dict[str, bytes] = field(default_factory=dict)  # by hash
    commits: list[dict[str, list[str]]] = field(default_factory=list)  # kind -> paths
    asked: list[tuple[str, str]] = field(default_factory=list)
    puts: Counter[str] = field(default_factory=Counter)  # whole large files that came, by hash
    failing: dict[str, int] = field(default_factory=dict)  # part of a path -> 500s still to give
    read_only: bool = False

    def content(self, repo: str, path: str) -> bytes:
        """Return the bytes of a committed file."""
        return self.objects[self.files[repo][path]]


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """Serve an empty hub inside the block."""
    hub = UploadHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.handle_any()

        def do_POST(self) -> None:
            self.handle_any()

        def do_PUT(self) -> None:
            self.handle_any()

        def handle_any(self) -> None:
            body = self.read_body()
            path = self.path.partition("?")[0]
            hub.asked.append((self.command, path))
            for part, left in hub.failing.items():
                if part in path and left:
                    hub.failing[part] -= 1
                    self.send(500, {"error": "out of order"})
                    return
            if path.startswith("/lfs/"):
                self.store(path.rpartition("/")[2], body)
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.send(401, {"error": "Invalid credentials in Authorization header"})
            else:
                self.answer(path, body)

        def read_body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = b""
            while size := int(self.rfile.readline(), 16):
                chunks += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return chunks

        def store(self, oid: str, body: bytes) -> None:
            if hashlib.sha256(body).hexdigest() != oid:
                self.send(400, {"error": "other bytes than announced"})
                return
            hub.objects[oid] = body
            hub.puts[oid] += 1
            self.send(200, {})

        def answer(self, path: str, body: bytes) -> None:
            parts = path.strip("/").split("/")
            if path == "/api/repos/create":
                self.create(json.loads(body))
            elif path == "/api/validate-yaml":
                self.send(200, {"errors": [], "warnings": []})
            elif path.endswith("/info/lfs/objects/batch"):
                self.send(200, {"objects": [batched(o) for o in json.loads(body)["objects"]]})
            elif (repo := "/".join(parts[2:4])) not in hub.private:
                self.send(404, {"error": "Repository not found"}, code="RepoNotFound")
            elif "preupload" in parts:
                found = [upload_mode(repo, f["path"]) for f in json.loads(body)["files"]]
                self.send(200, {"files": found})
            elif "commit" in parts:
                commit(repo, body)
                self.send(200, {"commitUrl": f"{hub.url}/{repo}/commit/1", "commitOid": "1" * 40})
            else:
                info = {"id": repo, "sha": "1" * 40, "private": hub.private[repo], "siblings": []}
                self.send(200, info)

        def create(self, asked: dict[str, Any]) -> None:
            repo = f"{asked['organization']}/{asked['name']}"
            if hub.read_only:
                self.send(403, {"error": "You don't have the rights to create a model"})
            elif repo in hub.private:
                answer = {"error": "You already created this model repo"}
                self.send(409, answer | {"url": f"{hub.url}/{repo}"})
            else:
                hub.private[repo] = asked.get("visibility") == "private" or bool(
                    asked.get("private")
                )
                hub.files[repo] = {}
                self.send(200, {"url": f"{hub.url}/{repo}"})

        def send(self, status: int, answer: dict[str, Any], code: str | None = None) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Stay quiet."""

    def upload_mode(repo: str, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(LARGE) else "regular"
        known = hub.files[repo].get(path)
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known}

    def batched(wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in hub.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}}

    def commit(repo: str, body: bytes) -> None:
        kinds: dict[str, list[str]] = {}
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                continue
            value = item["value"]
            kinds.setdefault(item["key"], []).append(value["path"])
            if item["key"] == "lfsFile":
                assert value["oid"] in hub.objects, "committed before it came"
                hub.files[repo][value["path"]] = value["oid"]
            else:
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                hub.objects[oid], hub.files[repo][value["path"]] = content, oid
        hub.commits.append(kinds)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
