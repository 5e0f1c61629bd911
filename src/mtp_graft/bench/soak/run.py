"""Hold a load of many kinds of requests, and compare each answer with the one given alone."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import count, pairwise
from random import Random
from statistics import median
from threading import Event, Lock
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from mtp_graft.bench.requests import Report
from mtp_graft.bench.soak.ask import ask
from mtp_graft.bench.soak.mix import MAX_ANSWER, MAX_QUESTION, Request, draw, make_pool
from mtp_graft.bench.soak.verdicts import (
    ENDS,
    EQUAL,
    NEAR_TIE,
    NEAR_TIE_NATS,
    SOUND,
    faults,
    judge,
    oddities,
)
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import NoAnswerInTime, Prompt, ServerClient
from mtp_graft.serving.metrics import SpecDecodeCounters

ERROR, HANG = "error", "hang"
#: What the result counts, by its key.
_COUNTED = {"equal": EQUAL, "near_ties": NEAR_TIE, "sound": SOUND, "hung_up": "hung up"}
_FAILED = {"errors": ERROR, "hangs": HANG}
_HERE = ("127.0.0.1", "localhost", "::1")
Record = dict[str, Any]


@dataclass(frozen=True)
class SoakConfig:
    """How long, how hard and with what a server is soaked."""

    minutes: float
    concurrency: int
    seed: int = 0
    near_tie_nats: float = NEAR_TIE_NATS
    longest: int = 16384  # tokens of a document; fewer if the context is smaller
    pool: int = 24  # different requests
    silence_s: float = 120.0  # after which a request hangs


def soak(
    client: ServerClient, reference: ServerClient, config: SoakConfig, report: Report
) -> dict[str, Any]:
    """Ask `reference` each request of a pool alone; then hold the load on the server.

    Returns the JSON of `bench soak`. Raises GraftError if a request alone fails.
    """
    started, alone = time.perf_counter(), {}
    with ServerClient(client.base_url, client.api_key, config.silence_s) as asked:
        pool, before = _make_pool(asked, config), asked.spec_decode_counters()
        ends = [ids[0] for e in ENDS if len(ids := asked.encode(Prompt(e, e))) == 1]
        for done, request in enumerate(pool):
            report("soak: each request alone", done, len(pool))
            alone[request.name] = ask(reference, request, with_logprobs=True)

        def try_one(request: Request) -> Record:
            answer, expected = ask(asked, request), alone[request.name]
            if request.hang_up_after and not answer.usage:
                return {"verdict": "hung up"}
            verdict = judge(request, answer, expected, ends, config.near_tie_nats)
            detail = {"said": answer.said, "alone": expected.said, "body": request.body}
            return {"verdict": verdict, "at_s": answer.at_s * request.streamed, "detail": detail}

        records, samples = _hold(asked, pool, try_one, config, report)
    odd = {r.name: faults(r, alone[r.name], ends) + oddities(alone[r.name]) for r in pool}
    return {
        **_summary(records),
        "seconds": time.perf_counter() - started,
        "alone": {name: kinds for name, kinds in odd.items() if kinds},
        **_over_time(before, samples),
    }


def _make_pool(client: ServerClient, config: SoakConfig) -> list[Request]:
    context, room = client.max_model_len(), MAX_ANSWER + MAX_QUESTION
    if context <= room:
        raise GraftError(
            f"{client.base_url}: a context of {context} tokens; a soak needs more than {room}: "
            "serve it with a larger --max-model-len"
        )
    text = str(make_pool(0, 3, 500, 1)[2].body["messages"][0]["content"])
    chars_per_token = len(text) / len(client.encode(Prompt("text", text)))
    longest = min(config.longest, context - room)
    return make_pool(config.seed, config.pool, longest, chars_per_token)


def _hold(
    client: ServerClient,
    pool: Sequence[Request],
    try_one: Callable[[Request], Record],
    config: SoakConfig,
    report: Report,
) -> tuple[list[Record], list[Record]]:
    """Ask with `concurrency` clients until time is up or the server is gone.

    Returns the records of the requests, and the server's counters and memory over time.
    """
    records: list[Record] = []
    random, numbers, lock, stop = Random(config.seed), count(), Lock(), Event()
    process, started, seconds = _server(client.base_url), time.monotonic(), 60 * config.minutes

    def ask_on() -> None:
        while not stop.is_set():
            with lock:
                request, number = draw(random, pool), next(numbers)
            try:
                record = try_one(request)
            except GraftError as error:
                verdict = HANG if isinstance(error, NoAnswerInTime) else ERROR
                record = {"verdict": verdict, "detail": {"message": str(error)}}
                if not client.is_healthy():
                    stop.set()
            records.append({"id": f"{number}-{request.name}", **record})

    samples = [_sample(client, process, 0.0)]
    with ThreadPoolExecutor(config.concurrency) as executor:
        clients = [executor.submit(ask_on) for _ in range(config.concurrency)]
        try:
            while wait(clients, max(0.5, seconds / 120)).not_done:
                samples.append(_sample(client, process, at_s := time.monotonic() - started))
                if at_s >= seconds:
                    stop.set()
                report(
                    f"soak: load, {len(records)} answers",
                    min(int(at_s), int(seconds)),
                    int(seconds),
                )
        finally:
            stop.set()
    for each in clients:
        each.result()
    return records, [*samples, _sample(client, process, time.monotonic() - started)]


def _server(base_url: str) -> psutil.Process | None:
    """Return the process that listens there, if it is on this machine and ours to see."""
    url = urlsplit(base_url)
    for each in psutil.net_connections("tcp") if url.hostname in _HERE else ():
        if each.status == psutil.CONN_LISTEN and each.laddr.port == url.port and each.pid:
            return psutil.Process(each.pid)
    return None


def _sample(client: ServerClient, process: psutil.Process | None, at_s: float) -> Record:
    try:
        processes = [process, *process.children(recursive=True)] if process else []
        memory = sum(each.memory_info().rss for each in processes) or None
        counters = client.spec_decode_counters()
    except (GraftError, psutil.NoSuchProcess):  # the requests tell of a server that is gone
        memory = counters = None
    return {"at_s": at_s, "counters": counters, "memory_bytes": memory}


def _over_time(before: SpecDecodeCounters | None, samples: Sequence[Record]) -> dict[str, Any]:
    """Return `acceptance`, `memory_growth` (last quarter over second, as a share), `over_time`."""
    counters = [before, *(sample["counters"] for sample in samples)]
    rates = [(b - a).acceptance if a and b else None for a, b in pairwise(counters)]
    first, last = counters[1], counters[-1]
    points = [
        {"at_s": s["at_s"], "acceptance": rate, "memory_bytes": s["memory_bytes"]}
        for s, rate in zip(samples, rates, strict=True)
    ][1:]
    memory = [point["memory_bytes"] for point in points if point["memory_bytes"]]
    quarter = len(memory) // 4
    late, early = memory[-quarter:], memory[quarter : 2 * quarter]
    return {
        "acceptance": {
            "alone": rates[0],
            "load": (last - first).acceptance if first and last else None,
        },
        "memory_growth": median(late) / median(early) - 1 if quarter else None,
        "over_time": points,
    }


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    num = Counter(record["verdict"] for record in records)
    counted = _COUNTED | _FAILED
    bad = [
        {"id": r["id"], "kind": r["verdict"], **r["detail"]}
        for r in records
        if r["verdict"] not in _COUNTED.values()
    ]
    times = [record["at_s"] for record in records if record.get("at_s")]
    gaps = [later - earlier for at_s in times for earlier, later in pairwise(at_s)]
    return {
        "requests": len(records),
        **{key: num[verdict] for key, verdict in counted.items()},
        "corrupted": [each for each in bad if each["kind"] not in _FAILED.values()],
        "failures": [each for each in bad if each["kind"] in _FAILED.values()],
        "ttft_ms": _percentiles([at_s[0] for at_s in times]),
        "gap_ms": _percentiles(gaps),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {f"p{share}": 1e3 * float(np.percentile(seconds, share)) for share in (50, 99)}
