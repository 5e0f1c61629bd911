"""vLLM's parsers, as `serve` configures them, on answers that the tiny model does not write.

It hardly ever ends its thinking or calls a tool by itself (`engine/test_endpoint.py` has what it
does say), so the answers are constructed, in the form that the chat encoding gives such turns.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the parsers are vLLM's: install an extra")

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager
from vllm.tokenizers import get_tokenizer

from mtp_graft.serving.profiles import ALWAYS, split

pytestmark = pytest.mark.vllm

FLAGS: Any = split(ALWAYS)[0]
QUESTION = {"role": "user", "content": "How much is 4 and 6, and where is the boat?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": type_} for key, type_ in parameters.items()},
            },
        },
    }
    for name, parameters in {
        "add": {"a": "integer", "b": "integer"},
        "find": {"what": "string"},
    }.items()
]
CALLS = [("add", {"a": 4, "b": 6}), ("find", {"what": 'the "big" boat <4>'})]
DSML_CALLS = """<｜DSML｜tool_calls>
<｜DSML｜invoke name="add">
<｜DSML｜parameter name="a" string="false">4</｜DSML｜parameter>
<｜DSML｜parameter name="b" string="false">6</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="find">
<｜DSML｜parameter name="what" string="true">the "big" boat <4></｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""
THOUGHT = "Four and six. They ask for a sum,\n\nand for a boat."
SAID = "I look it up."


@dataclass
class Message:
    """What a client gets: whole, or put together from a stream."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)


class Chat:
    """One request to the server, with the model's answer given."""

    def __init__(self, tokenizer: Any, thinking: bool, tools: bool) -> None:
        self.tokenizer = tokenizer
        self.kwargs = {"thinking": thinking}
        body: dict[str, Any] = {"model": "tiny", "messages": [QUESTION]}
        body |= {"chat_template_kwargs": self.kwargs}
        if tools:
            body |= {"tools": TOOLS, "tool_choice": "auto"}
        self.request = ChatCompletionRequest(**body)
        self.prompt = tokenizer.encode(self.rendered([QUESTION]), add_special_tokens=False)

    def rendered(self, messages: list[dict[str, Any]]) -> str:
        tools = [tool.model_dump() for tool in self.request.tools or ()]
        text: str = self.tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, **self.kwargs
        )
        return text

    def parser(self) -> Any:
        """Return a new parser, made as vLLM's chat endpoint makes it for each answer."""
        made = ParserManager.get_parser(
            tool_parser_name=FLAGS["--tool-call-parser"],
            reasoning_parser_name=FLAGS["--reasoning-parser"],
            enable_auto_tools="--enable-auto-tool-choice" in FLAGS,
            tokenizer=self.tokenizer,
        )
        assert made is not None
        parser = made(self.tokenizer, self.request.tools, chat_template_kwargs=self.kwargs)
        self.request = parser.adjust_request(self.request)
        return parser

    def whole(self, answer: str) -> Message:
        parser = self.parser()
        parser.set_prompt_token_ids(self.prompt)
        ids = self.tokenizer.encode(answer, add_special_tokens=False)
        text = self.tokenizer.decode(ids, skip_special_tokens=self.request.skip_special_tokens)
        reasoning, content, calls = parser.parse(
            text, self.request, enable_auto_tools=True, model_output_token_ids=ids
        )
        named = [(call.name, json.loads(call.arguments)) for call in calls or ()]
        return Message(reasoning or "", content or "", named)

    def streamed(self, answer: str, tokens_a_step: int) -> Message:
        parser, message = self.parser(), Message()
        names: list[str] = []
        arguments: list[str] = []
        steps = list(self.steps(answer, tokens_a_step))
        for number, (text, ids) in enumerate(steps):
            finished = number == len(steps) - 1
            delta = parser.parse_delta(text, ids, self.request, self.prompt, finished=finished)
            if delta is None:
                continue
            message.reasoning += delta.reasoning or ""
            message.content += delta.content or ""
            for part in delta.tool_calls or ():
                if part.index == len(names):
                    names.append("")
                    arguments.append("")
                names[part.index] += part.function.name or ""
                arguments[part.index] += part.function.arguments or ""
        message.calls = list(zip(names, map(json.loads, arguments), strict=True))
        return message

    def steps(self, answer: str, tokens_a_step: int) -> Iterator[tuple[str, list[int]]]:
        """Yield text and tokens of each step; a step with drafts has several tokens."""
        ids = self.tokenizer.encode(answer, add_special_tokens=False)
        skip, done = self.request.skip_special_tokens, ""
        for first in range(0, len(ids), tokens_a_step):
            step = ids[first : first + tokens_a_step]
            text = self.tokenizer.decode(ids[: first + len(step)], skip_special_tokens=skip)
            yield text.removeprefix(done), step
            done = text


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return get_tokenizer(tiny_model / "base", tokenizer_mode=FLAGS["--tokenizer-mode"])


def assert_parsed(chat: Chat, answer: str, expected: Message) -> None:
    """Compare the whole answer and streams of one, two and four tokens a step."""
    assert chat.whole(answer) == expected
    for tokens_a_step in (1, 2, 4):
        assert chat.streamed(answer, tokens_a_step) == expected, tokens_a_step


def test_a_thought_that_ends_is_reasoning_and_what_follows_is_content(tokenizer: Any) -> None:
    chat = Chat(tokenizer, thinking=True, tools=False)
    assert_parsed(chat, f"{THOUGHT}</think>{SAID}", Message(THOUGHT, SAID))


def test_a_thought_that_is_cut_off_is_reasoning_alone(tokenizer: Any) -> None:
    chat = Chat(tokenizer, thinking=True, tools=False)
    assert_parsed(chat, THOUGHT, Message(THOUGHT))


def test_without_thinking_all_is_content(tokenizer: Any) -> None:
    chat = Chat(tokenizer, thinking=False, tools=False)
    assert_parsed(chat, SAID, Message(content=SAID))


def test_calls_that_the_model_makes_by_itself_are_tool_calls(tokenizer: Any) -> None:
    chat = Chat(tokenizer, thinking=False, tools=True)
    assert_parsed(chat, DSML_CALLS, Message(calls=CALLS))


def test_an_answer_can_have_a_thought_words_and_calls(tokenizer: Any) -> None:
    chat = Chat(tokenizer, thinking=True, tools=True)
    answer = f"{THOUGHT}</think>{SAID}\n\n{DSML_CALLS}"
    assert_parsed(chat, answer, Message(THOUGHT, f"{SAID}\n\n", CALLS))


def test_the_chat_encoding_writes_calls_in_this_form(tokenizer: Any) -> None:
    calls = [
        {"type": "function", "function": {"name": name, "arguments": json.dumps(values)}}
        for name, values in CALLS
    ]
    turn = {"role": "assistant", "content": SAID, "tool_calls": calls}
    chat = Chat(tokenizer, thinking=False, tools=True)
    assert f"{SAID}\n\n{DSML_CALLS}<｜end▁of▁sentence｜>" in chat.rendered([QUESTION, turn])
