"""Speed under load: several streams at a time, for each number of speculative tokens."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from threading import Event, Lock
from typing import Any

from mtp_graft.bench.decode import Report, TokenPrompt, tokenize
from mtp_graft.bench.drafting import drafting_result
from mtp_graft.bench.intervals import mean_interval
from mtp_graft.bench.ledger import Ledger
from mtp_graft.bench.streams import Retrying, stream_whole
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import Completion, ServerClient
from mtp_graft.serving.concurrent import concurrently
from mtp_graft.serving.metrics import SpecDecodeCounters
from mtp_graft.serving.prompts import ChatPrompt, Prompt

#: Starts a server that drafts this many tokens; None: as it is.
ServeK = Callable[[int | None], AbstractContextManager[ServerClient]]
#: The window is cut into so many slices, whose speeds give the aggregate's interval.
_SLICES = 8


@dataclass(frozen=True)
class SweepConfig:
    """Which loads, and how long each is held."""

    streams: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    ks: tuple[int | None, ...] = (None,)
    max_tokens: int = 128
    requests_per_stream: int = 4
    ignore_eos: bool = True  # every request decodes equally long, so that the load is even
    temperature: float = 0.0


def measure_sweep(
    serve: ServeK,
    prompts: Sequence[Prompt | ChatPrompt],
    config: SweepConfig,
    report: Report,
    ledger: Ledger,
    new_retrying: Callable[[], Retrying] = Retrying,
) -> dict[str, Any]:
    """Hold every load on a server for each k; points that the ledger has are not measured again.

    Returns `points` (all that the ledger has then), `best_k` (for each load) and `dips` (loads that
    bring fewer tokens a second than the next smaller one). Raises GraftError if a request fails for
    good.
    """
    for k in config.ks:
        missing = [n for n in config.streams if _point_name(k, n) not in ledger]
        if not missing:
            continue
        with serve(k) as client:
            for streams in missing:
                label = "sweep" if k is None else f"sweep: k = {k}"
                show = partial(report, f"{label}: {streams} streams")
                retrying = new_retrying()
                token_prompts = tokenize(client, prompts, retrying)
                load = _Load(client, token_prompts, streams, config, retrying, show)
                load.run()
                asked = {} if k is None else {"k": k}  # else what the server drafts
                ledger.add(_point_name(k, streams), load.point() | asked)
    points = sorted(ledger.values(), key=_k_and_streams)
    return {"points": points, "best_k": best_k(points), "dips": dips(points)}


def _point_name(k: int | None, streams: int) -> str:
    return f"k={k}/streams={streams}"


def _k_and_streams(point: dict[str, Any]) -> tuple[int, int]:
    return -1 if point["k"] is None else point["k"], point["concurrency"]


class _Load:
    """A constant number of streams, each asking again as soon as it has its answer.

    A stream's first request is warm-up, of (i + 1)/N of the usual tokens, so that streams do not
    prefill in step ever after. The window begins when all N have done theirs. It ends when as many
    requests as wanted have begun and ended in it; until then every stream goes on, so the load is
    N all the way. What is in flight then runs out unmeasured.
    """

    def __init__(
        self,
        client: ServerClient,
        prompts: Sequence[TokenPrompt],
        streams: int,
        config: SweepConfig,
        retrying: Retrying,
        report: Callable[[int, int], None],
    ) -> None:
        self._num_wanted = config.requests_per_stream * streams
        self._client, self._prompts, self._streams = client, prompts, streams
        self._config, self._retrying, self._report = config, retrying, report
        self._lock = Lock()
        self._ended = Event()
        self._num_asked = self._num_warm = 0
        self._began_s = self._ended_s = 0.0
        self._completions: list[Completion] = []  # of the window's time and after it
        self._before: SpecDecodeCounters | None = None  # at the window's ends
        self._after: SpecDecodeCounters | None = None

    def run(self) -> None:
        """Hold the load; a caller that leaves, by Ctrl-C for one, does not wait for the streams."""
        self._report(0, self._num_wanted)
        try:
            list(concurrently(self._stream, range(self._streams), self._streams))
        finally:
            self._ended.set()

    def _stream(self, number: int) -> None:
        try:
            warm_up = max(2, self._config.max_tokens * (number + 1) // self._streams)
            self._keep(self._ask(warm_up), warm=True)
            while not self._ended.is_set():
                try:
                    completion = self._ask(self._config.max_tokens)
                except GraftError:
                    if self._ended_s:
                        break  # it was in flight when the window ended: nobody measures it
                    raise
                self._keep(completion)
        finally:
            self._ended.set()

    def _ask(self, max_tokens: int) -> Completion:
        with self._lock:
            prompt = self._prompts[self._num_asked % len(self._prompts)]
            self._num_asked += 1
        return self._retrying.ask(
            f"{self._streams} streams: {prompt.id}",
            lambda: stream_whole(
                self._client,
                prompt.token_ids,
                max_tokens,
                ignore_eos=self._config.ignore_eos,
                temperature=self._config.temperature,
            ),
        )

    def _keep(self, completion: Completion, *, warm: bool = False) -> None:
        """Note a finished request, and whether the window begins or ends with it."""
        with self._lock:
            self._num_warm += warm
            self._completions.append(completion)
            begins = warm and self._num_warm == self._streams
            num_measured = len(self._measured())
            self._report(num_measured, self._num_wanted)
            ends = not self._ended_s and num_measured >= self._num_wanted
            if ends:
                self._ended_s = time.perf_counter()
        if begins:
            self._before = self._count_drafts()
            self._began_s = time.perf_counter()
        if ends:
            self._after = self._count_drafts()
            self._ended.set()

    def _count_drafts(self) -> SpecDecodeCounters | None:
        name = f"{self._streams} streams: counters"
        return self._retrying.ask(name, self._client.spec_decode_counters)

    def _measured(self) -> list[Completion]:
        """Return the requests that began and ended in the window."""
        if not self._began_s:
            return []
        end = self._ended_s or float("inf")
        return [
            c
            for c in list(self._completions)
            if c.started_s >= self._began_s and c.chunks[-1][0] <= end
        ]

    def point(self) -> dict[str, Any]:
        """Return the point's JSON once the load has run."""
        measured = self._measured()
        seconds = self._ended_s - self._began_s
        speeds = [c.num_decoded / c.decode_s for c in measured if c.num_decoded]
        counts = self._tokens_in_slices()
        counters = None
        if self._before is not None and self._after is not None:
            counters = self._after - self._before
        return {
            "concurrency": self._streams,
            "per_stream_tok_s": median(speeds) if speeds else None,
            "per_stream_spread": [min(speeds), max(speeds)] if speeds else None,
            "aggregate_tok_s": sum(counts) / seconds,
            "aggregate_interval": list(
                mean_interval([count * _SLICES / seconds for count in counts])
            ),
            "ttft_ms": 1e3 * median(c.ttft_s for c in measured),
            "ttft_ms_max": 1e3 * max(c.ttft_s for c in measured),
            "acceptance": counters and counters.acceptance,
            **drafting_result(counters),
            "requests": len(measured),
            "tokens": sum(counts),
            "seconds": seconds,
            **self._retrying.as_dict(),
        }

    def _tokens_in_slices(self) -> list[int]:
        """Count the tokens of all streams that arrived in each slice of the window."""
        counts = [0] * _SLICES
        length = (self._ended_s - self._began_s) / _SLICES
        for completion in self._completions:
            for arrived, size in completion.chunks:
                if self._began_s < arrived <= self._ended_s:
                    counts[min(int((arrived - self._began_s) / length), _SLICES - 1)] += size
        return counts


def best_k(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each load, the k with the most tokens a second, and whether it stands out.

    It does if its interval lies above that of every other k. The intervals know what varied
    within the window, not what another start of the server would change.
    """
    found = []
    for streams in sorted({point["concurrency"] for point in points}):
        rivals = [p for p in points if p["concurrency"] == streams and p["k"] is not None]
        if len({point["k"] for point in rivals}) < 2:
            continue
        best = max(rivals, key=lambda point: point["aggregate_tok_s"])
        others = [point for point in rivals if point is not best]
        found.append(
            {
                "concurrency": streams,
                "k": best["k"],
                "aggregate_tok_s": best["aggregate_tok_s"],
                "clear": all(_lies_above(best, other) for other in others),
            }
        )
    return found


def dips(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the loads with fewer tokens a second than the next smaller load of the same k.

    Only where the intervals do not meet: this is the test for a drop at odd numbers of streams.
    """
    found = []
    for k in dict.fromkeys(point["k"] for point in points):
        of_k = sorted(
            (point for point in points if point["k"] == k), key=lambda point: point["concurrency"]
        )
        for smaller, larger in pairwise(of_k):
            # A default that drafts as many as another server was asked for has the same load.
            if smaller["concurrency"] < larger["concurrency"] and _lies_above(smaller, larger):
                found.append(
                    {
                        "k": k,
                        "concurrency": larger["concurrency"],
                        "aggregate_tok_s": larger["aggregate_tok_s"],
                        "smaller": smaller["concurrency"],
                        "smaller_aggregate_tok_s": smaller["aggregate_tok_s"],
                    }
                )
    return found


def _lies_above(one: dict[str, Any], other: dict[str, Any]) -> bool:
    lowest: float = one["aggregate_interval"][0]
    highest: float = other["aggregate_interval"][1]
    return lowest > highest
