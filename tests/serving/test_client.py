"""A server at the address that is no vLLM, or one that answers less than it was asked for."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from mtp_graft.errors import GraftError
from mtp_graft.serving.client import READ_ERRORS, Prompt, ServerClient


@pytest.fixture
def answering() -> Iterator[Callable[[str], str]]:
    """Return a function that serves one text for every request, and gives its address."""
    with ExitStack() as servers:

        def serve(text: str) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_POST(self) -> None:
                    self.rfile.read(int(self.headers["Content-Length"]))
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(text.encode())

            server = servers.enter_context(HTTPServer(("127.0.0.1", 0), Handler))
            servers.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return f"http://127.0.0.1:{server.server_port}"

        yield serve


def one_choice(**content: Any) -> str:
    return json.dumps({"choices": [content]})


NESTED = "[" * 100_000  # deeper than Python reads
Ask = Callable[[ServerClient], Any]


@pytest.mark.parametrize(
    ("text", "ask"),
    [
        ('{"count": 3}', lambda client: client.encode(Prompt("x", "x"))),
        ('{"choices": []}', lambda client: client.complete([1], 1)),
        (one_choice(text=" a"), lambda client: client.complete([1], 1)),
        (one_choice(token_ids=[7], logprobs=None), lambda client: client.score([1], 1)),
        (
            one_choice(token_ids=[7], logprobs={"top_logprobs": [{"token_id:7": 0.0}]}),
            lambda client: client.score([1], 1),
        ),
        ("[]", lambda client: client.complete([1], 1)),
        ("<html>", lambda client: client.complete([1], 1)),
        (NESTED, lambda client: client.complete([1], 1)),
    ],
)
def test_an_answer_that_is_not_vllms_is_one_error_with_the_address(
    answering: Callable[[str], str], text: str, ask: Ask
) -> None:
    url = answering(text)
    with ServerClient(url) as client, pytest.raises(GraftError, match=rf"{url}/.*is a vLLM server"):
        ask(client)


@pytest.mark.parametrize("event", ['{"choices": ["x"]}', "5", "{", NESTED])
def test_a_stream_that_cannot_be_read_raises_a_read_error(
    answering: Callable[[str], str], event: str
) -> None:
    url = answering(f"data: {event}\n\n")
    with ServerClient(url) as client, pytest.raises(READ_ERRORS):
        for found in client.events("/", {}):
            _ = found["choices"][0]["token_ids"]
