"""The requests of a soak, as data: the same seed gives the same ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from random import Random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

#: The most tokens that an answer has, and a prompt beside its document.
MAX_ANSWER, MAX_QUESTION = 256, 1024
#: Of drawn requests: sampled; computed without the prefix cache; the client hangs up.
_SAMPLED, _UNCACHED, _HANGS_UP = 0.3, 0.5, 0.05


class Reading(BaseModel):
    """What JSON answers and the arguments of demanded tool calls have to be."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "green", "blue"]
    count: int = Field(ge=0, le=99)


_SCHEMA = {"name": "note_reading", "strict": True}  # not strict: a call's form alone is held
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {**_SCHEMA, "parameters": Reading.model_json_schema()},
}
_JSON = {"type": "json_schema", "json_schema": {**_SCHEMA, "schema": Reading.model_json_schema()}}
_DIRECT = {"chat_template_kwargs": {"thinking": False}}
_THINKING = {"chat_template_kwargs": {"thinking": True}, "max_tokens": 128}
# Without the penalty a small model fills a form with white space, which its grammar allows.
_FORM = {**_DIRECT, "frequency_penalty": 2.0, "max_tokens": MAX_ANSWER}
_KINDS: Mapping[str, dict[str, Any]] = {
    "short": _DIRECT,
    "chat": _DIRECT,
    "long": _DIRECT,
    "thinking": _THINKING,
    "tools": {**_THINKING, "tools": [TOOL]},
    "call": {**_FORM, "tools": [TOOL], "tool_choice": "required"},
    "json": {**_FORM, "response_format": _JSON},
    "stop": {**_DIRECT, "stop": [".", "\n\n"]},
}


@dataclass(frozen=True)
class Request:
    """A chat to ask for; `name` is that of the pool's request that it was drawn from."""

    name: str
    body: Mapping[str, Any]  # without `stream`
    streamed: bool
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
        body = {"temperature": 0, "max_tokens": random.choice((8, 32, 96)), **_KINDS[kind]}
        body["messages"] = messages
        pool.append(Request(f"{kind}-{number}", body, random.random() < 0.6))
    return pool


def draw(random: Random, pool: Sequence[Request]) -> Request:
    """Return one of the pool as a client under load asks it."""
    request = random.choice(pool)
    body = dict(request.body)
    if random.random() < _SAMPLED:
        body |= {"temperature": 0.7, "top_p": 0.9, "seed": random.getrandbits(31)}
    if random.random() < _UNCACHED:
        body["cache_salt"] = f"{random.getrandbits(64):x}"
    leaves = request.streamed and random.random() < _HANGS_UP
    return replace(request, body=body, hang_up_after=random.randint(1, 8) if leaves else 0)
