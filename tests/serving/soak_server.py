"""A stand-in server for soaks: a sound one, but for a fault that is planted in some answers.

A character is a token. The fault is given every answer, or of those under load, which are asked
for without logprobs, every third. It drafts three tokens a step and accepts two.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from itertools import count
from random import Random
from typing import Any

import http_stand_in

BOS, EOS = 0, 1
WORDS = ["lamp", "boat", "crate", "river", "morning", "garden", "letter", "market", "stone"]
READING = '{"colour": "red", "count": 7}'
PREFIX = "vllm:spec_decode_num"
Json = dict[str, Any]
#: Changes an answer, as `sound` makes it, in place.
Fault = Callable[[Json], object]


def sound(body: Json) -> Json:
    """Return an answer; of the reasons "refuse" is a status of 500, and None a stream cut off."""
    random, size = Random(str([body["messages"], body.get("seed")])), body["max_tokens"]
    text = " ".join(random.choice(WORDS) for _ in range(60))[:size]
    answer = {"body": body, "call": None, "reason": "length", "prompt": len(str(body["messages"]))}
    key = "reasoning" if body["chat_template_kwargs"]["thinking"] else "content"
    if "tool_choice" in body:
        text, key = READING, "call"
        answer |= {"call": {"name": "note_reading", "arguments": READING}, "reason": "tool_calls"}
    elif "response_format" in body:
        text, answer["reason"] = READING, "stop"
    elif "stop" in body:
        text, answer["reason"] = text[:-1], "stop"
    end = [] if answer["reason"] == "length" else [EOS]
    said = {} if key == "call" else {key: text}
    return answer | {"said": said, "tokens": [*map(ord, text), *end]}


def choices(answer: Json, key: str, size: int) -> Iterator[Json]:
    """Yield the parts of an answer, of `size` tokens each."""
    tokens = answer["tokens"]
    for start in range(0, max(1, len(tokens)), size):
        end = start + size if start + size < len(tokens) else None
        said = {channel: text[start:end] for channel, text in answer["said"].items()}
        if answer["call"] and not start:
            said["tool_calls"] = [{"index": 0, "function": answer["call"]}]
        choice = {key: said, "token_ids": tokens[start:end]}
        if answer["body"].get("logprobs"):
            choice["logprobs"] = {"content": [*map(logprobs, tokens[start:end])]}
        yield choice | {"finish_reason": None if end else answer["reason"]}


def logprobs(token: int) -> Json:
    """Return those of a sure token; only a could as well have been b."""
    other, margin = (ord("b"), 0.25) if token == ord("a") else (2, 9.0)
    tops = [(token, -0.5), (other, -0.5 - margin)]
    own, *_ = tops = [{"token": f"token_id:{t}", "logprob": logprob} for t, logprob in tops]
    return {**own, "top_logprobs": tops}


def serving(fault: Fault | None = None, *, always: bool = False) -> AbstractContextManager[str]:
    answered, under_load = count(1), count()

    class Handler(http_stand_in.Handler):
        def do_GET(self) -> None:
            steps = next(answered)
            counts = {"drafts": steps, "draft_tokens": 3 * steps, "accepted_tokens": 2 * steps}
            self.say("".join(f"{PREFIX}_{name}_total {n}\n" for name, n in counts.items()))

        def do_POST(self) -> None:
            body = self.body()
            if self.path == "/tokenize":
                self.say({"count": len(body["prompt"]), "max_model_len": 4096})
                return
            answer = sound(body)
            third = not body.get("logprobs") and next(under_load) % 3 == 0
            if fault and (always or third):
                fault(answer)
            if answer["reason"] == "refuse":
                self.send_error(500)
            elif answer["reason"] == "gone":
                self.server.server_close()
            else:
                self.answer(answer)

        def answer(self, answer: Json) -> None:
            counts = [answer["prompt"], answer.get("completion", len(answer["tokens"]))]
            names = ("prompt_tokens", "completion_tokens", "total_tokens")
            usage = {"usage": dict(zip(names, [*counts, sum(counts)], strict=True))}
            if not answer["body"].get("stream"):
                self.say({"choices": [*choices(answer, "message", 10**6)], **usage})
                return
            self.send_response(200)
            self.end_headers()
            events = [{"choices": [choice]} for choice in choices(answer, "delta", 5)]
            for event in [*events, {"choices": [], **usage}][: None if answer["reason"] else -1]:
                with suppress(ConnectionError):  # the client hung up
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

        def say(self, content: Any) -> None:
            with suppress(ConnectionError):  # the client does not wait any longer
                self.reply(200, content)

    return http_stand_in.serving(Handler)
