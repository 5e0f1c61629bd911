"""vLLM's parsers, as `serve` configures them, on answers that the tiny model does not write.

It hardly ever ends its thinking or calls a tool by itself (`engine/test_endpoint.py` has what it
does say), so the answers are constructed; calls are in the form that the chat encoding gives them.
"""

import json
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
QUESTION = {"role": "user", "content": "Where are 4 boats, and where is the cow?"}
PROPERTIES = {"what": {"type": "string"}, "count": {"type": "integer"}}
FIND = {"name": "find", "parameters": {"type": "object", "properties": PROPERTIES}}
TOOLS = [{"type": "function", "function": FIND}]
CALLS = [("find", {"what": 'a "big" boat <4>', "count": 4}), ("find", {"what": "cow", "count": 1})]
THOUGHT = "Boats and a cow. They ask for two,\n\nso two calls."
SAID = "I look it up."
Message = tuple[str, str, list[tuple[str, Any]]]  # reasoning, content, calls


class Chat:
    """One request to the server, with the model's answer given."""

    def __init__(self, tokenizer: Any, thinking: bool, tools: bool) -> None:
        self.tokenizer, self.kwargs = tokenizer, {"thinking": thinking}
        body = {"model": "tiny", "messages": [QUESTION], "chat_template_kwargs": self.kwargs}
        self.request = ChatCompletionRequest(**body, **({"tools": TOOLS} if tools else {}))
        self.prompt = tokenizer.encode(self.rendered(QUESTION), add_special_tokens=False)

    def rendered(self, *messages: dict[str, Any]) -> str:
        tools = [tool.model_dump() for tool in self.request.tools or ()] or None
        how = {"tools": tools, "tokenize": False, **self.kwargs}
        return str(self.tokenizer.apply_chat_template([*messages], **how))

    def calls(self) -> str:
        """Return CALLS as the chat encoding writes them."""
        calls = [
            {"type": "function", "function": {"name": name, "arguments": json.dumps(values)}}
            for name, values in CALLS
        ]
        text = self.rendered(QUESTION, {"role": "assistant", "content": SAID, "tool_calls": calls})
        return text[text.index(f"{SAID}\n\n<｜DSML｜") + len(f"{SAID}\n\n") : text.rindex("<｜end")]

    def parser(self) -> Any:
        """Return a new parser, made as vLLM's chat endpoint makes it for each answer."""
        made: Any = ParserManager.get_parser(
            tool_parser_name=FLAGS["--tool-call-parser"],
            reasoning_parser_name=FLAGS["--reasoning-parser"],
            enable_auto_tools="--enable-auto-tool-choice" in FLAGS,
            tokenizer=self.tokenizer,
        )
        parser = made(self.tokenizer, self.request.tools, chat_template_kwargs=self.kwargs)
        self.request = parser.adjust_request(self.request)
        return parser

    def streamed(self, answer: str, tokens_a_step: int) -> Message:
        """Return what the parser makes of an answer; a step with drafts has several tokens."""
        parser, done, reasoning, content = self.parser(), "", "", ""
        calls: dict[int, list[str]] = {}
        ids = self.tokenizer.encode(answer, add_special_tokens=False)
        skip = self.request.skip_special_tokens
        for end in range(tokens_a_step, len(ids) + tokens_a_step, tokens_a_step):
            said = self.tokenizer.decode(ids[:end], skip_special_tokens=skip)
            step = said.removeprefix(done), ids[end - tokens_a_step : end]
            done, last = said, end >= len(ids)
            delta = parser.parse_delta(*step, self.request, self.prompt, finished=last)
            if delta is None:
                continue
            reasoning += delta.reasoning or ""
            content += delta.content or ""
            for part in delta.tool_calls or ():
                call = calls.setdefault(part.index, ["", ""])
                call[0] += part.function.name or ""
                call[1] += part.function.arguments or ""
        return reasoning, content, [(name, json.loads(text)) for name, text in calls.values()]


@pytest.mark.parametrize(
    ("thinking", "tools", "answer", "expected"),
    [
        (True, False, f"{THOUGHT}</think>{SAID}", (THOUGHT, SAID, [])),
        (True, False, THOUGHT, (THOUGHT, "", [])),  # cut off
        (False, False, SAID, ("", SAID, [])),
        (False, True, "CALLS", ("", "", CALLS)),
        (True, True, f"{THOUGHT}</think>{SAID}\n\nCALLS", (THOUGHT, f"{SAID}\n\n", CALLS)),
    ],
)
def test_thought_words_and_calls_of_a_stream_are_told_apart(
    tiny_model: Path, thinking: bool, tools: bool, answer: Any, expected: Any
) -> None:
    tokenizer = get_tokenizer(tiny_model / "base", tokenizer_mode=FLAGS["--tokenizer-mode"])
    chat = Chat(tokenizer, thinking, tools)
    answer = answer.replace("CALLS", chat.calls())
    for tokens_a_step in (1, 2, 4):
        assert chat.streamed(answer, tokens_a_step) == expected, tokens_a_step
