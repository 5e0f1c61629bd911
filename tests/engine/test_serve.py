"""`mtp-graft serve`'s server on the real engine: chat, reasoning parser, drafting, shutdown."""

from collections.abc import Iterator

import httpx
import pytest

from engine.conftest import Checkpoints
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.server import managed_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
QUESTION = "A boat carries 4 crates of 6 lamps each. How many lamps are on the boat?"


@pytest.fixture(scope="module")
def server(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerClient]:
    """A server that has answered a real completion, drafting one token a step."""
    log = tmp_path_factory.mktemp("serve") / "vllm.log"
    options = ServeOptions(checkpoints.spliced, port=0, max_model_len=1024, max_num_seqs=4)
    with managed_server(options, log) as client:
        yield client


def chat(server: ServerClient, thinking: bool) -> dict[str, str | None]:
    body = {
        "model": httpx.get(f"{server.base_url}/v1/models").json()["data"][0]["id"],
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 48,
        "temperature": 0,
        "chat_template_kwargs": {"thinking": thinking},
    }
    answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == httpx.codes.OK, answer.text
    message: dict[str, str | None] = answer.json()["choices"][0]["message"]
    return message


def test_without_thinking_the_answer_is_content(server: ServerClient) -> None:
    message = chat(server, thinking=False)
    assert message["content"]
    assert "<｜" not in message["content"], "a special token leaked into the text"


def test_with_thinking_the_parser_separates_the_reasoning(server: ServerClient) -> None:
    message = chat(server, thinking=True)
    assert message["reasoning"]
    assert "</think>" not in message["reasoning"]


def test_the_server_drafts_with_the_head_and_accepts_most(server: ServerClient) -> None:
    before = server.spec_decode_counters()
    chat(server, thinking=False)
    after = server.spec_decode_counters()
    assert before is not None
    assert after is not None
    gained = after - before
    assert gained.num_draft_tokens > 0
    assert gained.num_accepted_tokens / gained.num_draft_tokens > 1 / 3
