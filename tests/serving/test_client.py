"""A server at the address that is no vLLM, or one that answers less than it was asked for."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import http_stand_in
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import READ_ERRORS, Prompt, ServerClient


@contextmanager
def answering(text: str) -> Iterator[ServerClient]:
    class Handler(http_stand_in.Handler):
        def do_POST(self) -> None:
            self.body()
            self.reply(200, text)

    with http_stand_in.serving(Handler) as url, ServerClient(url) as client:
        yield client


def one_choice(**content: Any) -> str:
    return json.dumps({"choices": [content]})


NESTED = "[" * 100_000  # deeper than Python reads
ONE_TOP = {"top_logprobs": [{"token_id:7": 0.0}]}  # of two that are asked for
Ask = Callable[[ServerClient], Any]


@pytest.mark.parametrize(
    ("text", "ask"),
    [
        ('{"count": 3}', lambda client: client.encode(Prompt("x", "x"))),
        ('{"choices": []}', lambda client: client.complete([1], 1)),
        (one_choice(text=" a"), lambda client: client.complete([1], 1)),
        (one_choice(token_ids=[7], logprobs=None), lambda client: client.score([1], 1)),
        (one_choice(token_ids=[7], logprobs=ONE_TOP), lambda client: client.score([1], 1)),
        ("<html>", lambda client: client.complete([1], 1)),
        (NESTED, lambda client: client.complete([1], 1)),
    ],
)
def test_an_answer_that_is_not_vllms_is_one_error_with_the_address(text: str, ask: Ask) -> None:
    message = r"http://127\.0\.0\.1:\d+/.*is a vLLM server"
    with answering(text) as client, pytest.raises(GraftError, match=message):
        ask(client)


@pytest.mark.parametrize("event", ['{"choices": ["x"]}', "5", "{", NESTED])
def test_a_stream_that_cannot_be_read_raises_a_read_error(event: str) -> None:
    with answering(f"data: {event}\n\n") as client, pytest.raises(READ_ERRORS):
        for found in client.events("/", {"stream": True}):
            _ = found["choices"][0]["token_ids"]


def test_no_request_meets_a_connection_that_the_server_is_closing() -> None:
    """vLLM closes an idle connection after seconds, perhaps just when it is used again."""
    connections: list[object] = []

    class Handler(http_stand_in.Handler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_GET(self) -> None:
            if self.connection in connections:
                self.close_connection = True  # without an answer
                return
            connections.append(self.connection)
            self.reply(200, b"")

    with http_stand_in.serving(Handler) as url, ServerClient(url) as client:
        assert [client.spec_decode_counters() for _ in range(3)] == [None] * 3
    assert len(connections) == 3
