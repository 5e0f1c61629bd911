"""A stand-in chat server: it says what a function of the question says, or fails as told."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import http_stand_in

Message = dict[str, Any]
#: The first message -> the answer, a message, or one of FAILURES.
Say = Callable[[str], str | Message]
_ABORTED = {"index": 0, "message": {"role": "assistant", "content": "1"}, "finish_reason": "abort"}
#: Status and body; what `closes` says is shorter than it announces.
FAILURES: dict[str, tuple[int, Any]] = {
    "400": (400, {"error": {"message": "the maximum context length is 64 tokens", "code": 400}}),
    "500": (500, {"error": {"message": "out of luck", "code": 500}}),
    "closes": (200, {"choices": []}),
    "garbage": (200, {"choices": []}),
    "aborts": (200, {"model": "stand-in", "choices": [_ABORTED]}),
}


@dataclass
class ChatServer:
    """What the server was asked, for the tests to look at."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def asked(self) -> list[str]:
        """Return the first line of every question that came."""
        return [body["messages"][0]["content"].partition("\n")[0] for body in self.bodies]


@contextmanager
def serving(say: Say) -> Iterator[ChatServer]:
    class Handler(http_stand_in.Handler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(200, {"object": "list", "data": [{"id": "stand-in"}]})

        def do_POST(self) -> None:
            body = self.body()
            state.bodies.append({**body, "path": self.path})
            said = say(body["messages"][0]["content"])
            if isinstance(said, str) and said in FAILURES:
                self.close_connection = True
                self.reply(*FAILURES[said], missing=100 if said == "closes" else 0)
                return
            message = {"content": said} if isinstance(said, str) else said
            reason = message.get("finish_reason", "stop")
            choice = {"index": 0, "message": {"role": "assistant", **message}}
            choices = [choice | {"finish_reason": reason}]
            self.reply(200, {"model": "stand-in", "choices": choices})

    with http_stand_in.serving(Handler) as url:
        state = ChatServer(url)
        yield state
