"""A stand-in chat server: it says what a function of the request says, or fails as told."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Message = dict[str, Any]
#: The first message -> the answer, a message, or one of FAILURES.
Say = Callable[[str], str | Message]
FAILURES = ("500", "hangs", "closes", "garbage", "aborts")


@dataclass
class ChatServer:
    """What the server was asked, for the tests to look at."""

    say: Say
    delay_s: float = 0.0
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(say: Say, delay_s: float = 0.0) -> Iterator[ChatServer]:
    """Serve on a free port inside the block."""
    state = ChatServer(say, delay_s)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            with state.lock:
                state.bodies.append({**body, "path": self.path})
                said = state.say(text)
            time.sleep(state.delay_s)
            if isinstance(said, str) and said in FAILURES:
                self.fail(said)
                return
            with state.lock:
                state.answered[text] += 1
            message = {"role": "assistant", "reasoning": None, "tool_calls": []}
            message |= {"content": said} if isinstance(said, str) else said
            reason = message.pop("finish_reason", "stop")
            self.reply(200, {"choices": [{"message": message, "finish_reason": reason}]})

        def fail(self, how: str) -> None:
            if how == "hangs":
                state.released.wait(60)
                self.close_connection = True
            elif how == "closes":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.wfile.flush()
                self.close_connection = True
            elif how == "garbage":
                self.reply(200, {"choices": []})
            elif how == "aborts":
                choice = {"message": {"content": "#### 1"}, "finish_reason": "abort"}
                self.reply(200, {"choices": [choice]})
            else:
                self.reply(500, {"error": {"message": "out of luck"}})

        def reply(self, status: int, content: dict[str, Any]) -> None:
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
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()
