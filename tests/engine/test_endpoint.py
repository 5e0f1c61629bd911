"""The OpenAI-compatible endpoint on the real engine, MTP on, through the official client.

One server answers the whole file. The tiny model is not clever: what is tested holds whatever it
says. Greedy answers are reproducible, and sampled ones with a seed, so they can be compared.
"""

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from engine.conftest import MAX_MARGIN, Checkpoints, gauge, wait_until_idle
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import CPU_STEP, ServeOptions
from mtp_graft.serving.server import check_drafter, managed_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
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
    """Half as many places as the clients that come at once."""
    options = ServeOptions(
        checkpoints.spliced,
        port=0,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=4,
        served_model_names=(NAME, "another-name"),
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
    assert answer.model == NAME
    assert "<｜" not in content_of(answer), "a special token leaked into the text"
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 48
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert before is not None and after is not None
    gained = after - before
    assert gained.num_draft_tokens > 0, "the answer was not drafted"
    assert gained.num_accepted_tokens / gained.num_draft_tokens > 1 / 3


def test_every_served_name_is_listed_and_answers(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {NAME, "another-name"}
    assert content_of(ask(client, model="another-name")) == content_of(ask(client))


def test_a_stream_has_the_same_text_and_the_same_count(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(
        client.chat.completions.create(
            **request(stream=True, stream_options={"include_usage": True})
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == content_of(whole)
    assert sum(bool(piece) for piece in pieces) > 1, "the answer came in one piece"
    finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [reason for reason in finish if reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage


# Greedily the tiny model would fill the call with white space, which the grammar allows.
TOOL_CALL: dict[str, Any] = {"max_tokens": 400, "frequency_penalty": 2, "tools": [ADD_TOOL]}


def check_call(name: str | None, arguments: str | None) -> None:
    assert name == "add"
    values = json.loads(arguments or "")
    assert set(values) == {"a", "b"}
    assert all(isinstance(value, int) and 0 <= value <= 999 for value in values.values())


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=["any", "named"]
)
def test_a_demanded_tool_call_fits_its_schema(client: openai.OpenAI, choice: Any) -> None:
    message = ask(client, tool_choice=choice, **TOOL_CALL).choices[0].message
    assert message.tool_calls
    for call in message.tool_calls:
        assert call.type == "function"
        assert call.id
        check_call(call.function.name, call.function.arguments)
    assert "DSML" not in (message.content or ""), "the call's own syntax leaked into the text"


def test_a_streamed_tool_call_is_whole_when_put_together(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        **request(tool_choice="required", stream=True, **TOOL_CALL)
    )
    parts = [
        call
        for chunk in stream
        if chunk.choices
        for call in chunk.choices[0].delta.tool_calls or ()
        if call.index == 0 and call.function is not None
    ]
    names = [part.function.name for part in parts if part.function.name]
    check_call("".join(names), "".join(part.function.arguments or "" for part in parts))


def test_tools_change_the_prompt_and_their_results_are_taken(client: openai.OpenAI) -> None:
    plain = ask(client)
    offered = ask(client, tools=[ADD_TOOL], tool_choice="auto")
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


def test_without_tools_wanted_none_is_called(client: openai.OpenAI) -> None:
    answer = ask(client, tools=[ADD_TOOL], tool_choice="none")
    assert not answer.choices[0].message.tool_calls


def reasoning_of(message: Any) -> str | None:
    reasoning: str | None = (message.model_extra or {}).get("reasoning")
    return reasoning


def test_thinking_goes_into_reasoning_and_its_absence_into_content(client: openai.OpenAI) -> None:
    thought = ask(client, thinking=True).choices[0].message
    assert reasoning_of(thought)
    assert "think>" not in f"{reasoning_of(thought)}{thought.content}"
    plain = ask(client, thinking=False).choices[0].message
    assert plain.content
    assert not reasoning_of(plain)


def test_streamed_thinking_is_the_same_reasoning(client: openai.OpenAI) -> None:
    whole = ask(client, thinking=True).choices[0].message
    deltas = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(**request(thinking=True, stream=True))
        if chunk.choices
    ]
    assert "".join(reasoning_of(delta) or "" for delta in deltas) == reasoning_of(whole)
    assert "".join(delta.content or "" for delta in deltas) == (whole.content or "")


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    text = content_of(ask(client))
    words = re.findall(r"\w+", text)
    stop = next(word for word in words[3:] if text.index(word) > 0)
    stopped = ask(client, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(**request(stop=[stop], stream=True))
    streamed = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert streamed == stopped.choices[0].message.content


def test_logprobs_belong_to_the_tokens_of_the_answer(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None and answer.usage is not None
    tokens = answer.choices[0].logprobs.content
    assert tokens is not None
    assert len(tokens) == answer.usage.completion_tokens
    assert content_of(answer) in "".join(token.token for token in tokens)
    for token in tokens:
        best = [top.logprob for top in token.top_logprobs]
        assert len(best) >= 3
        assert best == sorted(best, reverse=True)
        assert token.logprob == best[0] <= 0, "a greedy token is the most probable one"


def test_eight_clients_at_once_are_answered_as_each_alone(client: openai.OpenAI) -> None:
    """On a CPU a token's last bit does not depend on what is computed beside it."""
    questions = ["How many lamps? " * (1 + number) for number in range(8)]
    alone = [ask(client, question) for question in questions]
    with ThreadPoolExecutor(len(questions)) as pool:
        together = list(pool.map(lambda question: ask(client, question), questions))
    assert [content_of(answer) for answer in together] == [content_of(one) for one in alone]
    assert [answer.usage for answer in together] == [one.usage for one in alone]
    assert len({content_of(one) for one in alone}) > 4, "hardly any answer is its client's own"


TOP_K = 20  # all that a server tells of a token's distribution, so all that a request asks for
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.5}
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 1},
    {"temperature": 0.8},
    {"temperature": 1, "top_p": 0.9},
    {"temperature": 0.8, **PENALTIES},
)


def ask_sampled(client: openai.OpenAI, number: int) -> ChatCompletion:
    more = {"top_k": TOP_K, "return_token_ids": True, "chat_template_kwargs": {"thinking": False}}
    setting = SAMPLED[number % len(SAMPLED)]
    question = f"Tell me of {number} lamps."
    return ask(client, question, seed=number, logprobs=True, extra_body=more, **setting)


def tokens_of(answer: ChatCompletion) -> list[int]:
    tokens: list[int] = (answer.choices[0].model_extra or {})["token_ids"]
    return tokens


@pytest.fixture(scope="module")
def sampled(client: openai.OpenAI) -> list[ChatCompletion]:
    """Answers to one request at a time, of each setting in turn."""
    return [ask_sampled(client, number) for number in range(12)]


def scored(client: openai.OpenAI, answer: ChatCompletion) -> list[tuple[float, list[float]]]:
    """Return each token's logprob and the best TOP_K, all computed as of a prompt: no drafts."""
    tokens = tokens_of(answer)
    whole = [*(answer.model_extra or {})["prompt_token_ids"], *tokens]
    more = {"prompt_logprobs": TOP_K}
    done = client.completions.create(model=NAME, prompt=whole, max_tokens=1, extra_body=more)
    steps = (done.choices[0].model_extra or {})["prompt_logprobs"][-len(tokens) :]
    return [
        (
            step[str(token)]["logprob"],
            sorted((s["logprob"] for s in step.values() if s["rank"] <= TOP_K), reverse=True),
        )
        for token, step in zip(tokens, steps, strict=True)
    ]


def distribution(best: list[float], temperature: float, top_p: float = 1) -> list[float]:
    """Return the probabilities that a request asks for; `best` are logprobs, falling."""
    weights = [math.exp(logprob / temperature) for logprob in best]
    nucleus: list[float] = []
    while sum(nucleus) < top_p * sum(weights) and len(nucleus) < len(weights):
        nucleus.append(weights[len(nucleus)])
    return [weight / sum(nucleus) for weight in nucleus]


def test_sampled_answers_are_as_probable_as_the_target_says(
    client: openai.OpenAI, sampled: list[ChatCompletion], measured: dict[str, Any]
) -> None:
    """The surplus of a token's logprob over its mean is 0 on average, whatever came before it.

    So their sum is within five of its deviations but for one seed in a million.
    """
    surplus = variance = 0.0
    distances = []
    for number, answer in enumerate(sampled):
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        setting = SAMPLED[number % len(SAMPLED)]
        for told, (own, best) in zip(logprobs.content, scored(client, answer), strict=True):
            distances.append(abs(told.logprob - own))
            if setting.keys() <= {"temperature", "top_p"}:
                asked = distribution(best, **setting)
                mean = sum(p * x for p, x in zip(asked, best, strict=False))
                surplus += own - mean
                variance += sum(p * (x - mean) ** 2 for p, x in zip(asked, best, strict=False))
    measured.update(tokens=len(distances), deviations=surplus / math.sqrt(variance))
    measured.update(mean_distance=sum(distances) / len(distances), most=max(distances))
    assert len(distances) > 200
    assert abs(surplus) < 5 * math.sqrt(variance)
    assert sum(distances) / len(distances) < 0.05
    assert max(distances) < MAX_MARGIN


def test_sampled_and_greedy_requests_do_not_disturb_each_other(
    client: openai.OpenAI, sampled: list[ChatCompletion]
) -> None:
    questions = [f"How many are {number} lamps?" for number in range(4)]
    greedy = [content_of(ask(client, question)) for question in questions]
    with ThreadPoolExecutor(8) as pool:
        beside = [pool.submit(ask_sampled, client, number) for number in range(4)]
        together = list(pool.map(lambda question: ask(client, question), questions))
    assert [content_of(answer) for answer in together] == greedy
    assert [tokens_of(each.result()) for each in beside] == [tokens_of(s) for s in sampled[:4]]


def test_a_client_that_leaves_in_mid_stream_frees_its_request(
    client: openai.OpenAI, server: ServerClient
) -> None:
    most = MAX_MODEL_LEN - 200
    before = gauge(server, "vllm:generation_tokens_total")
    stream = client.chat.completions.create(
        **request(stream=True, max_tokens=most)
        | {"extra_body": {"chat_template_kwargs": {"thinking": False}, "ignore_eos": True}}
    )
    for _chunk in stream:  # the gauge may follow the text by a step
        if gauge(server, "vllm:num_requests_running") == 1:
            break
    else:
        pytest.fail("the answer ended before the server counted its request as running")
    stream.close()
    wait_until_idle(server)
    generated = gauge(server, "vllm:generation_tokens_total") - before
    assert generated < most / 2, "it ended by itself"
    assert server.is_healthy()
    assert content_of(ask(client))


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
