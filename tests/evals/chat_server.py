"""A stand-in chat server: it says what a function of the question says, or fails as told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Message = dict[str, Any]
#: The first message -> the answer, a message, or one of FAILURES.
Say = Callable[[str], str | Message]
FAILURES = ("400", "500", "hangs", "closes", "garbage", "aborts")


@dataclass
class ChatServer:
    """What the server was asked, for the tests to look at."""

    say: Say
    delay_s: float = 0.0
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    in_work: int = 0
    most_in_work: int = 0  # at any time
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self) -> list[str]:
        """Return the first line of every question that came."""
        return [body["messages"][0]["content"].partition("\n")[0] for body in self.bodies]


@contextmanager
def serving(say: Say, delay_s: float = 0.0) -> Iterator[ChatServer]:
    """Serve on a free port inside the block."""
    state = ChatServer(say, delay_s)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply({"object": "list", "data": [{"id": "stand-in"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.bodies.append({**body, "path": self.path})
                said = state.say(body["messages"][0]["content"])
                state.in_work += 1
                state.most_in_work = max(state.most_in_work, state.in_work)
            time.sleep(state.delay_s)
            with state.lock:
                state.in_work -= 1
            if isinstance(said, str) and said in FAILURES:
                self.fail(said)
                return
            message = {"content": said} if isinstance(said, str) else dict(said)
            self.choose(message, message.pop("finish_reason", "stop"))

        def fail(self, how: str) -> None:
            if how == "hangs":
                state.released.wait(60)
            elif how == "closes":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
            elif how == "garbage":
                self.reply({"choices": []})
            elif how == "aborts":
                self.choose({"content": "#### 1"}, "abort")
            else:
                longer = "the maximum context length is 64 tokens"
                message = "out of luck" if how == "500" else longer
                self.reply({"error": {"message": message, "code": int(how)}}, int(how))
            self.close_connection = True

        def choose(self, message: Message, reason: str) -> None:
            choice = {"index": 0, "message": {"role": "assistant", **message}}
            self.reply({"model": "stand-in", "choices": [choice | {"finish_reason": reason}]})

        def reply(self, content: dict[str, Any], status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Stay quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()
