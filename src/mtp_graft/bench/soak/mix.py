"""The requests of a soak, as data: the same seed gives the same ones."""

import json
from collections.abc import Sequence
from importlib.resources import files
from random import Random
from typing import Any, NamedTuple

from mtp_graft.bench.decode import STREAM

#: The most tokens that an answer has, and a prompt beside its document.
MAX_ANSWER, MAX_QUESTION = 256, 1024
#: Of drawn requests: sampled; computed without the prefix cache; the client hangs up.
_SAMPLED, _UNCACHED, _HANGS_UP = 0.3, 0.5, 0.05


class Request(NamedTuple):
    """A chat to ask for; `name` is that of the pool's request that it was drawn from."""

    name: str
    body: dict[str, Any]
    hang_up_after: int = 0  # chunks; 0: the client stays to the end


def make_pool(seed: int, size: int, longest: int, chars_per_token: float) -> list[Request]:
    """Return `size` greedy requests of eight kinds in turn, documents of up to `longest` tokens.

    A small model fills a form with white space, which its grammar allows; a penalty is against it.
    """
    folder = files("mtp_graft.bench")
    found = json.loads((folder / "workload.json").read_text("utf-8"))
    kinds = [*json.loads((folder / "soak" / "mix.json").read_text("utf-8")).items()]
    text = "\n\n".join("\n\n".join(paragraphs) for paragraphs in found["documents"].values())
    random, pool = Random(seed), []
    for number in range(size):
        kind, special = kinds[number % len(kinds)]
        user = "Hello" if kind == "short" else random.choice(found["tasks"])["text"]
        if kind == "long":
            length, start = int(random.uniform(0.3, 1) * longest * chars_per_token), number * 100
            user = (text * (2 + length // len(text)))[start : start + length] + f"\n\n{user}"
        messages = [{"role": "user", "content": user}]
        if kind not in ("short", "long"):  # a prefix that these share
            messages.insert(0, {"role": "system", "content": found["system"]})
        body = {"messages": messages, "temperature": 0, "max_tokens": random.choice((8, 32, 96))}
        body |= {"return_token_ids": True, "chat_template_kwargs": {"thinking": False}, **special}
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
