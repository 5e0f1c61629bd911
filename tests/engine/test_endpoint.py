"""A server of the real engine, MTP on: its endpoint by the official client, and our benchmarks.

One server answers the whole file. The tiny model is not clever: what is tested holds whatever it
says. Greedy answers are reproducible, and sampled ones with a seed, so they can be compared.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from mtp_graft.bench.decode import STREAM, read_answer
from mtp_graft.bench.soak import SoakConfig, make_pool, margin, soak
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import CPU_STEP, ServeOptions
from mtp_graft.serving.server import check_drafter, managed_server

pytestmark = [pytest.mark.vllm, pytest.mark.serves, pytest.mark.slow]
NAME = "deepseek-v4-flash"
API_KEY = "a-key-of-the-tests"
MAX_MODEL_LEN = 3072  # more than a step of vLLM's own on a CPU
QUESTION = "A boat carries 4 crates of 6 lamps each. How many lamps are on the boat?"
SMALL_NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
NUMBERS = {"properties": {"a": SMALL_NUMBER, "b": SMALL_NUMBER}, "required": ["a", "b"]}
ADD: dict[str, Any] = {"name": "add", "description": "Add two whole numbers."}
ADD |= {"parameters": {"type": "object", **NUMBERS, "additionalProperties": False}}
# Without `strict` vLLM holds the model to the call's form, not to the schema.
ADD_TOOL: dict[str, Any] = {"type": "function", "function": ADD | {"strict": True}}


@pytest.fixture(scope="module")
def running() -> Iterator[ExitStack]:
    """What the server runs in, until it is closed."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def server(
    running: ExitStack, spliced: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> ServerClient:
    named: dict[str, Any] = {"served_model_names": (NAME,), "api_key": API_KEY, "port": 0}
    limits = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 4, "num_speculative_tokens": 3}
    options = ServeOptions(spliced["bf16"], **named, **limits)
    log = tmp_path_factory.mktemp("endpoint") / "vllm.log"
    return running.enter_context(managed_server(options, log))


@pytest.fixture(scope="module")
def client(server: ServerClient) -> Iterator[openai.OpenAI]:
    how: dict[str, Any] = {"api_key": API_KEY, "max_retries": 0, "timeout": 120}
    with openai.OpenAI(base_url=f"{server.base_url}/v1", **how) as client:
        yield client


def request(question: str = QUESTION, thinking: bool = False, **more: Any) -> dict[str, Any]:
    asked = {"model": NAME, "messages": [{"role": "user", "content": question}]}
    body = {"extra_body": {"chat_template_kwargs": {"thinking": thinking}}}
    return {**asked, "max_tokens": 48, "temperature": 0, **body, **more}


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
    assert gained.num_accepted_tokens / gained.num_draft_tokens > 1 / 4


@pytest.mark.parametrize("thinking", [False, True])
def test_a_stream_has_the_same_text_and_count(client: openai.OpenAI, thinking: bool) -> None:
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
    calls = [{"id": "call-1", "type": "function", "function": function}]
    conversation = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": calls},
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


def test_a_server_survives_clients_mistakes(client: openai.OpenAI, server: ServerClient) -> None:
    with pytest.raises(openai.NotFoundError):
        ask(client, model="nobody")
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(client, "lamp " * (2 * MAX_MODEL_LEN))
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="another"))
    assert server.is_healthy()


def test_the_check_of_serve_finds_the_head_alive(server: ServerClient) -> None:
    assert (check_drafter(server).acceptance or 0) > 0.3


# What our benchmarks make of it. The tiny model's scores mean nothing.

EVALS = ("gsm8k", "humaneval", "mmlu", "capability")
CHAT = "/v1/chat/completions"
LOGPROBS = {"logprobs": True, "top_logprobs": 10, "return_tokens_as_token_ids": True}


@pytest.mark.usefixtures("sandbox")
def test_every_benchmark_completes(mtp_graft: Any, server: ServerClient, shared_data: Path) -> None:
    pytest.importorskip("inspect_ai", reason="Inspect is not installed (extra `evals`)")
    limited = ("--data-dir", shared_data, "--limit", 3)
    asked = {name: ("--max-tokens", 24, *limited) for name in EVALS[:3]}
    asked |= {"capability": ("--max-tokens", 24), "workload": ("--max-tokens", 32)}
    asked |= {"decode": ("--max-tokens", 16, "--limit", 2, "--rounds", 1)}
    load = ("--concurrency", "1,3", "--max-tokens", 8, "--limit", 3, "--requests", 1)
    asked |= {"sweep": load}
    where = ("--base-url", server.base_url, "--api-key", API_KEY, "--run", Path("run"))
    results = {name: mtp_graft("bench", name, *where, *more) for name, more in asked.items()}
    assert [results[name]["total"] for name in EVALS] == [3, 3, 3, 14]

    workload = results["workload"]
    assert workload["requests"] == 15
    assert all(0 < task["completion_tokens"] <= 32 for task in workload["tasks"])
    assert workload["acceptance"] is not None

    decode = results["decode"]
    assert (decode["num_prompts"], decode["tokens_per_round"]) == (2, 32)
    assert decode["decode_tok_s"]["median"] > 0
    one, two, three = decode["acceptance_by_position"]
    assert decode["k"] == 3 and 0 < one <= 1
    # A step accepts a draft only where it accepted the one before.
    assert decode["acceptance_length"] == pytest.approx(1 + one * (1 + two * (1 + (three or 0))))

    points = results["sweep"]["points"]
    assert [(p["k"], p["concurrency"]) for p in points] == [(3, 1), (3, 3)], "an odd load"
    for point in points:
        assert point["requests"] >= point["concurrency"] and point["errors"] == 0
        assert point["tokens"] >= 8 * point["concurrency"]
        assert len(point["acceptance_by_position"]) == 3


def test_a_sound_server_soaks_well(server: ServerClient, measured: dict[str, Any]) -> None:
    config = SoakConfig(minutes=0.02, concurrency=4, pool=8)
    result = soak(server, server, config, lambda *_: None)
    measured |= {key: result[key] for key in ("requests", "equal", "sound", "acceptance")}
    assert result["corrupted"] == result["failures"] == []
    assert result["near_ties"] == 0 < result["equal"] and result["requests"] >= 4
    assert 0.1 < result["acceptance"]["load"] < 1


def test_margins_are_those_of_the_token_where_texts_part(server: ServerClient) -> None:
    for _, body, _ in make_pool(1, 4, longest=100, chars_per_token=3.0):
        reference = read_answer(server, CHAT, body | LOGPROBS)
        assert len(reference["logprobs"]) == len(reference["token_ids"])
        other = {**reference, "token_ids": [4000, *reference["token_ids"][1:]]}
        assert 0 < margin(other, reference) < 100


def test_a_server_that_stops_finishes_its_work(running: ExitStack, server: ServerClient) -> None:
    """The last test: there is no server after it."""
    begun = Event()

    def ask() -> list[dict[str, Any]]:
        found = []
        body = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 100, **STREAM}
        with ServerClient(server.base_url, API_KEY) as client:
            for event in client.events(CHAT, {**body, "ignore_eos": True, "temperature": 0}):
                found.append(event)
                begun.set()
        return found

    with ThreadPoolExecutor(1) as executor:
        last = executor.submit(ask)
        assert begun.wait(60)
        running.close()
        assert last.result()[-1]["usage"]["completion_tokens"] == 100
