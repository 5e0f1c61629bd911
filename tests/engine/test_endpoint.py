"""The OpenAI-compatible endpoint on the real engine, MTP on, through the official client.

One server answers the whole file. The tiny model is not clever: what is tested holds whatever it
says. Greedy answers are reproducible, and sampled ones with a seed, so they can be compared.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from engine.conftest import Checkpoints
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import CPU_STEP, ServeOptions
from mtp_graft.serving.server import check_drafter, managed_server

pytestmark = [pytest.mark.vllm, pytest.mark.serves, pytest.mark.slow]
NAME = "deepseek-v4-flash"
API_KEY = "a-key-of-the-tests"
MAX_MODEL_LEN = 3072  # more than a step of vLLM's own on a CPU
QUESTION = "A boat carries 4 crates of 6 lamps each. How many lamps are on the boat?"
SMALL_NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
ADD_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two whole numbers.",
        "strict": True,  # without it vLLM holds the model to the call's form, not to the schema
        "parameters": {
            "type": "object",
            "properties": {"a": SMALL_NUMBER, "b": SMALL_NUMBER},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerClient]:
    options = ServeOptions(
        checkpoints.spliced,
        port=0,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=4,
        served_model_names=(NAME,),
        api_key=API_KEY,
    )
    with managed_server(options, tmp_path_factory.mktemp("endpoint") / "vllm.log") as client:
        yield client


@pytest.fixture(scope="module")
def client(server: ServerClient) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.base_url}/v1", api_key=API_KEY, max_retries=0, timeout=120
    ) as client:
        yield client


def request(question: str = QUESTION, thinking: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 48,
        "temperature": 0,
        "extra_body": {"chat_template_kwargs": {"thinking": thinking}},
        **more,
    }


def ask(client: openai.OpenAI, *arguments: Any, **more: Any) -> ChatCompletion:
    answer: ChatCompletion = client.chat.completions.create(**request(*arguments, **more))
    return answer


def content_of(answer: ChatCompletion) -> str:
    content = answer.choices[0].message.content
    assert content, answer
    return content


def test_a_chat_is_answered_and_counted(client: openai.OpenAI, server: ServerClient) -> None:
    before = server.spec_decode_counters()
    answer = ask(client)
    after = server.spec_decode_counters()
    assert answer.model == NAME == client.models.list().data[0].id
    assert "<｜" not in content_of(answer), "a special token leaked into the text"
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 48
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert before is not None and after is not None
    gained = after - before
    assert gained.num_draft_tokens > 0, "the answer was not drafted"
    assert gained.num_accepted_tokens / gained.num_draft_tokens > 1 / 3


@pytest.mark.parametrize("thinking", [False, True])
def test_a_stream_has_the_same_text_reasoning_and_count(
    client: openai.OpenAI, thinking: bool
) -> None:
    whole = ask(client, thinking=thinking)
    asked = request(thinking=thinking, stream_options={"include_usage": True})
    with client.chat.completions.stream(**asked) as stream:
        choices = [c for event in stream if event.type == "chunk" for c in event.chunk.choices]
        streamed = stream.current_completion_snapshot  # `get_final` refuses those cut off
    assert sum(said(c.delta) != ("", "") for c in choices) > 1, "the answer came in one piece"
    reasoning, content = said(streamed.choices[0].message)
    assert (reasoning, content) == said(whole.choices[0].message)
    assert bool(reasoning) == thinking, "thinking goes into reasoning, all else into content"
    assert "think>" not in reasoning + content
    assert streamed.choices[0].finish_reason == whole.choices[0].finish_reason
    assert streamed.usage == whole.usage


def said(message: Any) -> tuple[str, str]:
    """Return the reasoning and the content of a message, or of a part of it."""
    return (message.model_extra or {}).get("reasoning") or "", message.content or ""


# Greedily the tiny model would fill the call with white space, which the grammar allows.
TOOL_CALL: dict[str, Any] = {"max_tokens": 400, "frequency_penalty": 2, "tools": [ADD_TOOL]}


def check_calls(message: Any) -> None:
    assert message.tool_calls
    for call in message.tool_calls:
        assert (call.type, call.function.name) == ("function", "add") and call.id
        values = json.loads(call.function.arguments)
        assert set(values) == {"a", "b"}
        assert all(isinstance(value, int) and 0 <= value <= 999 for value in values.values())
    assert "DSML" not in (message.content or ""), "the call's own syntax leaked into the text"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=["any", "named"]
)
def test_a_demanded_tool_call_fits_its_schema(client: openai.OpenAI, choice: Any) -> None:
    check_calls(ask(client, tool_choice=choice, **TOOL_CALL).choices[0].message)


def test_a_streamed_tool_call_is_whole_when_put_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**request(tool_choice="required", **TOOL_CALL)) as stream:
        check_calls(stream.get_final_completion().choices[0].message)


def test_tools_change_the_prompt_and_their_results_are_taken(client: openai.OpenAI) -> None:
    plain = ask(client)
    offered = ask(client, tools=[ADD_TOOL], tool_choice="none")
    assert not offered.choices[0].message.tool_calls
    assert plain.usage is not None and offered.usage is not None
    assert offered.usage.prompt_tokens > plain.usage.prompt_tokens + 20
    function = {"name": "add", "arguments": '{"a": 4, "b": 6}'}
    conversation = [
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call-1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": "10"},
    ]
    answer = ask(client, tools=[ADD_TOOL], messages=conversation)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > offered.usage.prompt_tokens


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    text = content_of(ask(client))
    words = re.findall(r"\w+", text)
    stop = next(word for word in words[3:] if text.index(word) > 0)
    stopped = ask(client, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_prompt_longer_than_vllms_own_step_is_answered(client: openai.OpenAI) -> None:
    answer = ask(client, "the " * 2300, max_tokens=2)
    assert answer.usage is not None and answer.usage.prompt_tokens > CPU_STEP


def test_mistakes_are_the_clients_and_the_server_goes_on(
    client: openai.OpenAI, server: ServerClient
) -> None:
    with pytest.raises(openai.NotFoundError):
        ask(client, model="nobody")
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(client, "lamp " * (2 * MAX_MODEL_LEN))
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="another"))
    assert server.is_healthy()


def test_the_check_of_serve_finds_the_head_alive(server: ServerClient) -> None:
    assert (check_drafter(server).acceptance or 0) > 0.5
