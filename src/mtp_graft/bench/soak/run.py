"""Hold a load of many kinds of requests, and compare each answer with the one given alone."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count, pairwise
from random import Random
from statistics import median
from threading import Event, Lock
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil

from mtp_graft.bench.decode import Answer, read_answer
from mtp_graft.bench.soak.mix import MAX_ANSWER, MAX_QUESTION, Request, draw, make_pool
from mtp_graft.bench.soak.verdicts import EQUAL, NEAR_TIE, SOUND, faults, judge, oddities, said
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.metrics import SpecDecodeCounters
from mtp_graft.serving.server import Report

_PATH = "/v1/chat/completions"
_LOGPROBS = {"logprobs": True, "top_logprobs": 10, "return_tokens_as_token_ids": True}
_MAX_DOCUMENT = 16384  # tokens
#: What the result counts, by its key.
_FINE = {"equal": EQUAL, "near_ties": NEAR_TIE, "sound": SOUND, "hung_up": "hung up"}
_FAILED = {"errors": "error", "hangs": "hang"}
Record = dict[str, Any]


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
        longest = min(_MAX_DOCUMENT, found["max_model_len"] - MAX_ANSWER - MAX_QUESTION)
        pool = make_pool(config.seed, config.pool, longest, len(text) / found["count"])
        watch = _Watch(asked)
        for done, (name, body, _) in enumerate(pool):
            report("soak: each request alone", done, len(pool))
            alone[name] = read_answer(reference, _PATH, body | _LOGPROBS)

        def ask(request: Request) -> Record:
            answer = read_answer(asked, _PATH, request.body, request.hang_up_after)
            if request.hang_up_after and "total_tokens" not in answer:
                return {"kind": "hung up"}
            expected, times = alone[request.name], [at_s for at_s, _ in answer["chunks"]]
            record = {"said": said(answer), "alone": said(expected), "body": request.body}
            record["times"] = times if "stream" in request.body else []
            return {"kind": judge(request, answer, expected), **record}

        records = _hold(ask, watch.look, pool, config, report)
    odd = {r.name: faults(r, alone[r.name]) + oddities(alone[r.name]) for r in pool}
    odd = {name: kinds for name, kinds in odd.items() if kinds}
    return {**_summary(records), "alone": odd, **watch.result(), "config": config._asdict()}


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
            records.append({"id": f"{number}-{request.name}", **record})

    look()
    with ThreadPoolExecutor(config.concurrency) as executor:
        clients = [executor.submit(ask_on) for _ in range(config.concurrency)]
        try:
            while wait(clients, max(0.5, seconds / 120)).not_done:
                now = time.monotonic() - started
                if now >= seconds:
                    stop.set()
                report(f"soak: load, {len(records)} answers", int(min(now, seconds)), int(seconds))
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
        return {
            "seconds": time.perf_counter() - self._started,
            "acceptance": {
                "alone": _rate(self._seen[0][1], counters[0]),
                "load": _rate(counters[0], counters[-1]),
            },
            "memory_growth": median(late) / median(early) - 1 if early else None,
            "over_time": [
                {"at_s": at_s, "acceptance": _rate(before, after), "memory_bytes": size}
                for (_, before, _), (at_s, after, size) in pairwise(self._seen[1:])
            ],
        }


def _rate(earlier: SpecDecodeCounters | None, later: SpecDecodeCounters | None) -> float | None:
    return (later - earlier).acceptance if earlier and later else None


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    num, failed = Counter(record["kind"] for record in records), [*_FAILED.values()]
    bad = [{k: r[k] for k in r if k != "times"} for r in records if r["kind"] not in _FINE.values()]
    times = [record["times"] for record in records if record.get("times")]
    gaps = [later - earlier for each in times for earlier, later in pairwise(each)]

    def percentiles(seconds: Sequence[float]) -> dict[str, float]:
        return {f"p{p}": 1e3 * float(np.percentile(seconds, p)) for p in (50, 99) if seconds}

    return {
        "requests": len(records),
        **{key: num[kind] for key, kind in {**_FINE, **_FAILED}.items()},
        "corrupted": [record for record in bad if record["kind"] not in failed],
        "failures": [record for record in bad if record["kind"] in failed],
        "ttft_ms": percentiles([each[0] for each in times]),
        "gap_ms": percentiles(gaps),
    }
