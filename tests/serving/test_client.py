"""A server at the address that is no vLLM, or one that answers less than it was asked for."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from mtp_graft.bench.streams import BenchClient, BrokenAnswer, stream_whole
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ServerClient


@pytest.fixture
def answering() -> Iterator[Callable[..., str]]:
    """Return a function that serves one text for every request, and gives its address."""
    servers = []

    def serve(text: str, **headers: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                """Stay quiet."""

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def one_choice(**content: Any) -> str:
    return json.dumps({"choices": [content]})


NESTED = "[" * 100_000  # deeper than Python reads


@pytest.mark.parametrize(
    ("text", "ask"),
    [
        ('{"count": 3}', lambda client: client.tokenize("x")),
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
    answering: Callable[[str], str], text: str, ask: Callable[[ServerClient], Any]
) -> None:
    url = answering(text)
    with (
        ServerClient(url) as client,
        pytest.raises(GraftError, match=rf"{url}/.*is a vLLM server at this address\?"),
    ):
        ask(client)


def streamed(*events: Any) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events)


def chunk(**content: Any) -> dict[str, Any]:
    return {"choices": [{"token_ids": [7], "finish_reason": "stop", **content}]}


LAST = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


def test_a_chats_stream_may_say_null_where_there_is_no_text(
    answering: Callable[[str], str],
) -> None:
    text = streamed(chunk(delta={"content": None, "reasoning": "so"}), LAST)
    with BenchClient(answering(text)) as client:
        answer = client.stream_chat({})
    assert (answer.num_content_chars, answer.num_reasoning_chars) == (0, 2)


@pytest.mark.parametrize(
    "text",
    [
        streamed({"choices": ["x"]}, LAST),
        streamed(chunk(delta=None), LAST),
        streamed(chunk(delta={"content": ["x"]}), LAST),
        streamed(chunk(delta={"content": 0}), LAST),
        streamed(chunk(delta={"reasoning": {"x": 1}}), LAST),
        streamed(chunk(delta={}, finish_reason=["stop"]), LAST),
        streamed(chunk(delta={}), {"choices": [], "usage": 1}),
        streamed(chunk(delta={}), {"choices": [], "usage": {"completion_tokens": 1}}),
        f"data: {NESTED}\n\n",
    ],
)
def test_a_chats_stream_that_cannot_be_read_is_a_broken_answer(
    answering: Callable[[str], str], text: str
) -> None:
    with BenchClient(answering(text)) as client, pytest.raises(BrokenAnswer):
        client.stream_chat({})


@pytest.mark.parametrize(
    "text",
    [
        streamed({"choices": ["x"]}),
        streamed(5),
        streamed(chunk(text="x", finish_reason=["stop"])),
        f"data: {NESTED}\n\n",
    ],
)
def test_a_completions_stream_that_cannot_be_read_is_a_broken_answer(
    answering: Callable[[str], str], text: str
) -> None:
    with ServerClient(answering(text)) as client, pytest.raises(BrokenAnswer):
        stream_whole(client, [1], 1, ignore_eos=True, temperature=0.0)


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.complete([1], 1),
        lambda client: stream_whole(client, [1], 1, ignore_eos=True, temperature=0.0),
    ],
)
def test_an_answer_packed_otherwise_than_it_says_is_one_error(
    answering: Callable[..., str], ask: Callable[[ServerClient], Any]
) -> None:
    url = answering("{}", Content_Encoding="gzip")
    with ServerClient(url) as client, pytest.raises(GraftError, match=f"{url}: no answer"):
        ask(client)
