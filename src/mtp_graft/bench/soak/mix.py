"""The requests of a soak, as data: the same seed gives the same ones."""

import json
from collections.abc import Sequence
from importlib.resources import files
from random import Random
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from mtp_graft.bench.requests import STREAM

#: The most tokens that an answer has, and a prompt beside its document.
MAX_ANSWER, MAX_QUESTION = 256, 1024
#: Of drawn requests: sampled; computed without the prefix cache; the client hangs up.
_SAMPLED, _UNCACHED, _HANGS_UP = 0.3, 0.5, 0.05


class Reading(BaseModel):
    """What JSON answers and the arguments of demanded tool calls have to be."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green", "blue"]
    count: int = Field(ge=0, le=99)


TOOL_NAME = "note_reading"
_FORM = {"name": TOOL_NAME, "strict": True}  # not strict, a call may have any arguments
_TOOL = {"type": "function", "function": {**_FORM, "parameters": Reading.model_json_schema()}}
_JSON = {"type": "json_schema", "json_schema": {**_FORM, "schema": Reading.model_json_schema()}}
_ALWAYS = {"return_token_ids": True, "chat_template_kwargs": {"thinking": False}}
_THINKING = {"chat_template_kwargs": {"thinking": True}, "max_tokens": 128}
# Without the penalty a small model fills a form with white space, which its grammar allows.
_FILLED = {"frequency_penalty": 2.0, "max_tokens": MAX_ANSWER}
_KINDS: dict[str, dict[str, Any]] = {
    **{"short": {}, "chat": {}, "long": {}, "stop": {"stop": [".", "\n\n"]}},
    **{"thinking": _THINKING, "tools": {**_THINKING, "tools": [_TOOL]}},
    "call": {**_FILLED, "tools": [_TOOL], "tool_choice": "required"},
    "json": {**_FILLED, "response_format": _JSON},
}


class Request(NamedTuple):
    """A chat to ask for; `name` is that of the pool's request that it was drawn from."""

    name: str
    body: dict[str, Any]
    hang_up_after: int = 0  # chunks; 0: the client stays to the end


def make_pool(seed: int, size: int, longest: int, chars_per_token: float) -> list[Request]:
    """Return `size` greedy requests of eight kinds in turn, documents of up to `longest` tokens."""
    found = json.loads((files("mtp_graft.bench") / "workload.json").read_text("utf-8"))
    text = "\n\n".join("\n\n".join(paragraphs) for paragraphs in found["documents"].values())
    random, pool = Random(seed), []
    for number in range(size):
        kind = [*_KINDS][number % len(_KINDS)]
        user = "Hello" if kind == "short" else random.choice(found["tasks"])["text"]
        if kind == "long":
            length, start = int(random.uniform(0.3, 1) * longest * chars_per_token), number * 100
            user = (text * (2 + length // len(text)))[start : start + length] + f"\n\n{user}"
        messages = [{"role": "user", "content": user}]
        if kind not in ("short", "long"):  # a prefix that these share
            messages.insert(0, {"role": "system", "content": found["system"]})
        body = {"messages": messages, "temperature": 0, "max_tokens": random.choice((8, 32, 96))}
        body |= {**_ALWAYS, **_KINDS[kind]}
        pool.append(Request(f"{kind}-{number}", body | (STREAM if random.random() < 0.6 else {})))
    return pool


def draw(random: Random, pool: Sequence[Request]) -> Request:
    """Return one of the pool as a client under load asks it."""
    name, body, leave = random.choice(pool)
    if random.random() < _SAMPLED:
        body = {**body, "temperature": 0.7, "top_p": 0.9, "seed": random.getrandbits(31)}
    if random.random() < _UNCACHED:
        body = {**body, "cache_salt": f"{random.getrandbits(64):x}"}
    if "stream" in body and random.random() < _HANGS_UP:
        leave = random.randint(1, 8)
    return Request(name, body, leave)
