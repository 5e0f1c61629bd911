"""What the stand-ins for servers share: a quiet handler, and a server on a free port."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Reads a request's JSON, answers bytes, text or JSON with a length, and logs nothing."""

    def body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, status: int, content: Any, headers: Any = (), missing: int = 0) -> None:
        """Answer with fewer bytes than are announced, if any are missing."""
        is_json = not isinstance(content, str | bytes)
        text = json.dumps(content) if is_json else content
        data = text.encode() if isinstance(text, str) else text
        kind = ("Content-Type", "application/json" if is_json else "text/plain")
        self.send_response(status)
        for name, value in (*headers, kind, ("Content-Length", str(len(data) + missing))):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(handler: type[Handler], host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve on a port, a free one by default, inside the block; give the address."""
    with ThreadingHTTPServer((host, port), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
