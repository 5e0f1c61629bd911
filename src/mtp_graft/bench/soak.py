"""Does a server write under a load of many kinds of requests what it writes alone?"""

import json
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from importlib.resources import files
from itertools import chain, count, pairwise
from random import Random
from statistics import median
from threading import Event, Lock
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil

from mtp_graft.bench.decode import STREAM, WHOLE_REASONS, Answer, first_difference, read_answer
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.metrics import SpecDecodeCounters
from mtp_graft.serving.server import Report

_PATH = "/v1/chat/completions"
_LOGPROBS = {"logprobs": True, "top_logprobs": 10, "return_tokens_as_token_ids": True}
_MAX_DOCUMENT, _MAX_QUESTION, _MAX_ANSWER = 16384, 1024, 256  # tokens
EQUAL, NEAR_TIE, SOUND = "equal", "near tie", "sound"
#: What the result counts, by its key.
_FINE = {"equal": EQUAL, "near_ties": NEAR_TIE, "sound": SOUND, "hung_up": "hung up"}
_FAILED = {"errors": "error", "hangs": "hang"}
#: Of drawn requests: sampled; computed without the prefix cache; the client hangs up.
_SAMPLED, _UNCACHED, _HANGS_UP = 0.3, 0.5, 0.05
#: Nats between two tokens of which rounding may choose either. On a sound H200: up to 0.7, and 2.1
#: once, after a long prompt.
_NEAR_TIE_NATS = 2.5
#: DeepSeek's begin and end of text, which no model writes inside an answer; control tokens' names.
_ENDS = {0, 1}
_CONTROL = re.compile(r"<[｜|][^｜|<>\n]{1,40}[｜|]>|</?think>|｜DSML｜")
#: A loop: so many tokens before the last, which repeat at most so many.
_LOOP_TOKENS, _LOOP_PERIOD = 64, 12
#: Of answers that cannot be compared, this share may be odd; more count if of several requests.
_MAX_ODD, _MIN_ODD = 0.1, 3
#: Letters, and their share, from which on a new script counts; tokens that must have some text.
_MIN_LETTERS, _MIN_SHARE, _MIN_TOKENS = 20, 0.3, 8
Record = dict[str, Any]


class Request(NamedTuple):
    """A chat to ask for; `name` is that of the pool's request that it was drawn from."""

    name: str
    body: dict[str, Any]
    hang_up_after: int = 0  # chunks; 0: the client stays to the end


class SoakConfig(NamedTuple):
    """How long, how hard and with what a server is soaked."""

    minutes: float
    concurrency: int
    seed: int = 0
    pool: int = 24  # different requests
    silence_s: float = 120.0  # after which a request hangs


def soak(
    client: ServerClient, reference: ServerClient, config: SoakConfig, report: Report
) -> dict[str, Any]:
    """Ask `reference` each request of a pool alone; then hold the load on the server.

    Returns the JSON of `bench soak`. Raises GraftError if a request alone fails.
    """
    alone: dict[str, Answer] = {}
    with ServerClient(client.base_url, client.api_key, config.silence_s) as asked:
        text = make_pool(0, 3, 500, 1)[2].body["messages"][0]["content"]
        found = next(asked.events("/tokenize", {"prompt": text}))
        longest = min(_MAX_DOCUMENT, found["max_model_len"] - _MAX_ANSWER - _MAX_QUESTION)
        pool = make_pool(config.seed, config.pool, longest, len(text) / found["count"])
        watch = _Watch(asked)
        for done, (name, body, _) in enumerate(pool):
            report("soak: each request alone", done, len(pool))
            alone[name] = read_answer(reference, _PATH, body | _LOGPROBS)

        def ask(request: Request) -> Record:
            answer = read_answer(asked, _PATH, request.body, request.hang_up_after)
            if request.hang_up_after and "total_tokens" not in answer:
                return {"kind": "hung up"}
            expected, found = alone[request.name], {"odd": oddities(answer), "body": request.body}
            found["times"] = [at_s for at_s, _ in answer["chunks"] if "stream" in request.body]
            kind = judge(request, answer, expected)
            return {"kind": kind, "said": said(answer), "alone": said(expected), **found}

        records = _hold(ask, watch.look, pool, config, report)
    where = "alone" if reference is client else "alone, of the reference"
    found = _summary(records) | _find_corrupted(records, pool, alone, where) | watch.result()
    return {**found, "config": config._asdict()}


def _hold(
    ask: Callable[[Request], Record],
    look: Callable[[], None],
    pool: Sequence[Request],
    config: SoakConfig,
    report: Report,
) -> list[Record]:
    """Ask with `concurrency` clients until time is up or the server is gone; return the records."""
    records: list[Record] = []
    random, numbers, lock, stop = Random(config.seed), count(), Lock(), Event()
    started, seconds = time.monotonic(), 60 * config.minutes
    every_s = max(0.5, seconds / 120)

    def ask_on() -> None:
        while not stop.is_set():
            with lock:
                request, number = draw(random, pool), next(numbers)
            try:
                record = ask(request)
            except GraftError as error:
                silent = isinstance(error.__cause__, httpx.ReadTimeout)
                record = {"kind": "hang" if silent else "error", "message": str(error)}
                if isinstance(error.__cause__, httpx.ConnectError):
                    stop.set()
            records.append({"id": f"{number}-{request.name}", "where": "under load", **record})

    look()
    with ThreadPoolExecutor(config.concurrency) as executor:
        clients = [executor.submit(ask_on) for _ in range(config.concurrency)]
        try:
            now = 0.0
            while wait(clients, min(every_s, seconds - now) or every_s).not_done:
                now = min(time.monotonic() - started, seconds)
                if now == seconds:
                    stop.set()
                report(f"soak: load, {len(records)} answers", int(now), int(seconds))
                look()
        finally:
            stop.set()
    for each in clients:
        each.result()
    return records


class _Watch:
    """The server's drafts, and its memory if it runs here, over time."""

    def __init__(self, client: ServerClient) -> None:
        url, self._client, self._started = urlsplit(client.base_url), client, time.perf_counter()
        is_here = url.hostname in ("127.0.0.1", "localhost", "::1")
        found = psutil.net_connections("tcp") if is_here else []
        listening = [c.pid for c in found if c.laddr.port == url.port and c.status == "LISTEN"]
        self._processes = [psutil.Process(pid) for pid in listening if pid]
        self._seen: list[tuple[float, SpecDecodeCounters | None, int | None]] = []
        self.look()

    def look(self) -> None:
        """Note what was drafted and accepted so far, and the resident memory."""
        try:
            workers = [c for each in self._processes for c in each.children(recursive=True)]
            memory = sum(each.memory_info().rss for each in {*self._processes, *workers}) or None
            counters = self._client.spec_decode_counters()
        except (GraftError, psutil.NoSuchProcess):  # the requests tell of a server that is gone
            return
        self._seen.append((time.perf_counter() - self._started, counters, memory))

    def result(self) -> dict[str, Any]:
        """Return the JSON; `memory_growth` is of the last quarter over the second, as a share."""
        _, counters, memory = zip(*self._seen[1:], strict=True)
        known = [size for size in memory if size]
        quarter = len(known) // 4
        late, early = known[-quarter:], known[quarter : 2 * quarter]
        alone, load = _rate(self._seen[0][1], counters[0]), _rate(counters[0], counters[-1])
        return {
            "seconds": time.perf_counter() - self._started,
            "acceptance": {"alone": alone, "load": load},
            "memory_growth": median(late) / median(early) - 1 if early else None,
            "over_time": [
                {"at_s": at_s, "acceptance": _rate(before, after), "memory_bytes": size}
                for (_, before, _), (at_s, after, size) in pairwise(self._seen[1:])
            ],
        }


def _rate(earlier: SpecDecodeCounters | None, later: SpecDecodeCounters | None) -> float | None:
    return (later - earlier).acceptance if earlier and later else None


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    num = Counter(record["kind"] for record in records)
    times = [times for record in records if (times := record.pop("times", None))]
    gaps = [later - earlier for each in times for earlier, later in pairwise(each)]

    def percentiles(seconds: Sequence[float]) -> dict[str, float]:
        return {f"p{p}": 1e3 * float(np.percentile(seconds, p)) for p in (50, 99) if seconds}

    return {
        "requests": len(records),
        **{key: num[kind] for key, kind in (_FINE | _FAILED).items()},
        "failures": [record for record in records if record["kind"] in _FAILED.values()],
        "ttft_ms": percentiles([each[0] for each in times]),
        "gap_ms": percentiles(gaps),
    }


def _find_corrupted(
    records: Sequence[Record], pool: Sequence[Request], alone: dict[str, Answer], where: str
) -> dict[str, Any]:
    """Return the faults of the answers alone and under load, and what is odd in either."""
    hard = {r.name: faults(r, alone[r.name]) for r in pool}
    kinds = {name: found + oddities(alone[name]) for name, found in hard.items()}
    about = {r.name: {"said": said(alone[r.name]), "where": where, "body": r.body} for r in pool}
    corrupted = [{"id": n, "kind": k, **about[n]} for n, found in hard.items() for k in found]
    corrupted += [r for r in records if r["kind"] not in (_FINE | _FAILED).values()]
    free = [record for record in records if record["kind"] in (NEAR_TIE, SOUND)]
    odd = Counter(kind for record in free for kind in record["odd"])
    for kind in odd.keys() - {*chain(*kinds.values())}:
        found = {r["id"].partition("-")[2]: r for r in free if kind in r["odd"]}
        if odd[kind] > _MAX_ODD * len(free) and len(found) >= _MIN_ODD:
            where = f"{odd[kind]} of {len(free)} that cannot be compared"
            corrupted.append({**found.popitem()[1], "kind": kind, "where": where})
    return {"corrupted": corrupted, "alone": {n: k for n, k in kinds.items() if k}, "odd": odd}


# The requests, as data: the same seed gives the same ones


def make_pool(seed: int, size: int, longest: int, chars_per_token: float) -> list[Request]:
    """Return `size` greedy requests of eight kinds in turn, documents of up to `longest` tokens.

    A small model fills a form with white space, which its grammar allows; a penalty is against it.
    """
    folder = files("mtp_graft.bench")
    found = json.loads((folder / "workload.json").read_text("utf-8"))
    kinds = [*json.loads((folder / "soak.json").read_text("utf-8")).items()]
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


# What is wrong with an answer, beside the one to the same request that was asked alone


def judge(request: Request, answer: Answer, reference: Answer) -> str:
    """Return EQUAL, NEAR_TIE, SOUND (sampled or penalized, of good form), or the kind of fault.

    Loops and names of control tokens count only where a greedy text has no reason to differ.
    """
    body, alone = request.body, faults(request, reference)
    found = [kind for kind in faults(request, answer) if kind not in alone]
    if answer.get("prompt_tokens") != reference.get("prompt_tokens"):
        found.append("usage")
    if not found and body["temperature"] == 0 and said(answer) == said(reference):
        if answer["finish_reason"] == reference["finish_reason"]:
            return EQUAL
        if answer["token_ids"] == reference["token_ids"]:
            return "finish reason"
    if _has_new_script(answer, reference):
        found.append("script")
    if found or body["temperature"]:
        return found[0] if found else SOUND
    if answer["token_ids"] == reference["token_ids"][: len(answer["token_ids"])]:
        return "truncated"
    if "frequency_penalty" in body:  # which log-probabilities do not show
        return SOUND
    if margin(answer, reference) <= _NEAR_TIE_NATS:
        return NEAR_TIE
    return next((k for k in oddities(answer) if k not in oddities(reference)), "other text")


def said(answer: Answer) -> tuple[str, str, list[list[str]]]:
    """Return all that a user sees: reasoning, content, and tool calls with their arguments."""
    calls = [*answer.get("calls", {}).values()]
    return answer.get("reasoning", ""), "".join(answer["texts"]), calls


def faults(request: Request, answer: Answer) -> list[str]:
    """Return the kinds of fault in an answer's form."""
    body, reason, size = request.body, answer["finish_reason"], len(answer["token_ids"])
    reasoning, text, calls = said(answer)
    prompt, new, total = (answer.get(f"{n}_tokens", 0) for n in ("prompt", "completion", "total"))
    called = calls and all(name == "note_reading" and _fits(given) for name, given in calls)
    found = {
        "truncated": reason is None or "total_tokens" not in answer,
        "finish reason": reason not in WHOLE_REASONS
        or (reason == "length" and size < body["max_tokens"])
        or (reason == "tool_calls" and not calls),
        "usage": new != size or size > body["max_tokens"] or not prompt or prompt + new != total,
        # Tokens of a call that has only begun have no text.
        "empty": not size
        or (size >= _MIN_TOKENS and "tools" not in body and not (reasoning or text)),
        "control tokens": not _ENDS.isdisjoint(answer["token_ids"][:-1]),
        "broken JSON": reason == "stop" and "response_format" in body and not _fits(text),
        "broken tool call": reason != "length" and "tool_choice" in body and not called,
        "stop string": any(stop in text for stop in body.get("stop", ())),
    }
    return [kind for kind, is_there in found.items() if is_there]


def oddities(answer: Answer) -> list[str]:
    """Return what a large model does not write, and a small one may."""
    end, periods = answer["token_ids"][:-1][-_LOOP_TOKENS:], range(1, _LOOP_PERIOD + 1)
    loops = len(end) == _LOOP_TOKENS and any(end[n:] == end[:-n] for n in periods)
    text = "".join(map(str, said(answer)))
    found = ["loop"] * loops + ["U+FFFD"] * ("\ufffd" in text.rstrip("\ufffd"))  # a cut character
    return ["control tokens"] * bool(_CONTROL.search(text)) + found


def margin(answer: Answer, reference: Answer) -> float:
    """Return the nats between the two tokens where texts part; past an end, infinitely many."""
    theirs, ours = reference["token_ids"], answer["token_ids"]
    place, known = first_difference(theirs, ours), reference.get("logprobs", [])
    if place is None or place >= min(len(theirs), len(ours), len(known)):
        return float("inf")
    best: dict[str, float] = known[place]
    there = best.get(f"token_id:{ours[place]}", min(best.values()))
    return best[f"token_id:{theirs[place]}"] - there


def _fits(text: str) -> bool:
    """Return whether a text is what the schema in soak.json asks for."""
    colours = ("red", "green", "blue")
    with suppress(ValueError):
        return json.loads(text) in [{"colour": c, "count": n} for c in colours for n in range(100)]
    return False


def _has_new_script(answer: Answer, reference: Answer) -> bool:
    letters = (filter(str.isalpha, "".join(said(a)[:2])) for a in (answer, reference))
    ours, theirs = (Counter(unicodedata.name(c, "").split(" ")[0] for c in x) for x in letters)
    new = sum(count for script, count in ours.items() if script not in theirs)
    enough = min(ours.total(), theirs.total()) >= _MIN_LETTERS
    return enough and new >= _MIN_SHARE * ours.total()
