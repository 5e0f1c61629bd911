"""Time decode steps with and without MTP, at several loads and rates of acceptance.

    python benchmarks/step_time.py --folder FOLDER --out result.json --layers 5 17

FOLDER is `flash_width.py`'s. One engine for each number of layers, head and k; on it, for each
number of streams, context and rate of acceptance, one decode of `--steps` steps. What is in the
result already is not measured again, what fails is in `failures`. The most telling come first.

Weights are random, so the head's drafts agree with nothing. On a GPU vLLM accepts them at the rate
that it is told (`rejection_sample_method: synthetic`); without that (`--natural`, and on a CPU,
which has no such sampler) the acceptance is about 0. Text is sampled at temperature 1: greedy text
of random weights repeats one token, and a step that sees a token twice reads fewer experts.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from engines import (
    EngineOptions,
    Send,
    counters,
    decode,
    exit_on_sigterm,
    gained,
    has_accelerator,
    random_prompts,
    set_rate,
    start,
    summarize_steps,
    time_gpu,
)
from measurements import Deadline, Entry, Limits, Measurements

NOTE = (
    "Random weights of Flash's width, offline engine, no HTTP. step_ms is the time between two "
    "outputs of the engine while all streams decode; gpu_ms (clock: true), taken by a profiler "
    "after all others, the part of a step in which the GPU computes or waits for a sum. rate: "
    "synthetic acceptance of each draft, if all before it were accepted; null: what the random "
    "head happens to get, about 0. results has the medians over all rates at the shortest context."
)
CPU_NOTE = " A small form on a shared CPU: it shows that the script runs, and nothing about a GPU."

#: Prompts whose first token is timed, of one stream.
PROMPTS = 7


@dataclass(frozen=True)
class Job:
    """One engine."""

    layers: int
    variant: str  # base, int4 or mxfp4
    k: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.layers}-k{self.k}"


@dataclass(frozen=True)
class Point:
    """One decode on it."""

    streams: int
    context: int
    rate: float | None
    clock: bool = False  # the GPU's time is taken, and not the step's


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 17])
    parser.add_argument("--variants", nargs="+", default=["int4", "mxfp4"])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1000])
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 0.6, 0.7, 0.85, 0.95])
    parser.add_argument("--natural", action="store_true", help="no synthetic acceptance")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--no-clock", action="store_true", help="do not profile the GPU")
    Limits.add_options(parser)
    return parser.parse_args()


def jobs(options: argparse.Namespace) -> list[Job]:
    """Return the engines in order of value: k = 1 before 2, a whole pair of layers before a head.

    With the first four there is a speed-up to extrapolate.
    """
    found = [Job(layers, "base", 0) for layers in options.layers]
    for k in options.k:
        found += [Job(layers, v, k) for v in options.variants for layers in options.layers]
    return found


def points(job: Job, options: argparse.Namespace) -> list[Point]:
    natural = options.natural or job.k == 0
    rates = [None] if natural else options.rates
    steps = [Point(n, c, r) for c in options.contexts for n in options.streams for r in rates]
    return steps + clocks(steps, options)


def clocks(points: Iterable[Point], options: argparse.Namespace) -> list[Point]:
    """Return the points at which the GPU is timed, a load each; none on a CPU. They come last."""
    if options.no_clock or not has_accelerator():
        return []
    loads = dict.fromkeys((point.streams, point.context) for point in points)
    return [Point(*load, None, clock=True) for load in loads]


def missing(job: Job, options: argparse.Namespace, done: Measurements) -> list[Point]:
    return [p for p in points(job, options) if not done.has(**vars(job), **vars(p))]


def measure(
    send: Send, job: Job, todo: list[Point], options: argparse.Namespace, deadline: Deadline
) -> None:
    """Start the engine and send one entry for each point; runs in a process of its own."""
    began = time.perf_counter()
    rate = None if options.natural or job.k == 0 else max(options.rates)
    checkpoint = options.folder / f"{job.variant}-{job.layers}"
    per_stream = max(options.contexts) + options.steps * (1 + job.k) + 64
    engine = EngineOptions(
        *(checkpoint, job.k, per_stream, max(options.streams), 8192),
        gpu_memory_utilization=options.gpu_memory_utilization,
        rate=rate,
        eager=options.eager,
    )
    llm = start(engine)
    identity = {**vars(job), "start_s": time.perf_counter() - began}
    measure_points(send, llm, checkpoint, identity, todo, options, deadline)


def measure_points(
    send: Send,
    llm: Any,
    checkpoint: Path,
    identity: Entry,
    todo: list[Point],
    options: argparse.Namespace,
    deadline: Deadline,
) -> None:
    """Send an entry for each point, `identity` in it; of more streams than seats, some wait."""
    vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    warmed: set[tuple[int, int]] = set()
    first_tokens: dict[int, list[float]] = {}  # of one stream, by context
    for point in todo:
        if deadline.passed():
            return
        prompts = random_prompts(point.streams, point.context, vocabulary)
        if point.rate is not None:
            set_rate(llm, point.rate)
        if (point.streams, point.context) not in warmed:
            decode(llm, prompts, 16, options.temperature)
            warmed.add((point.streams, point.context))
            if point.streams == 1:
                first_tokens[point.context] = ttfts_ms(llm, point.context, vocabulary)
        seated = min(point.streams, identity.get("seats", point.streams))
        if point.clock:
            send({**identity, **vars(point), **clocked(llm, prompts, identity["k"], options)})
            continue
        before = counters(llm)
        wanted = num_tokens(options.steps, identity["k"], point.rate)
        steps, text = decode(llm, prompts, wanted, options.temperature)
        entry = summarize_steps(steps, seated) | gained(before, counters(llm))
        if point.streams == 1:
            entry["ttfts_ms"] = first_tokens[point.context]
        send({**identity, **vars(point), **entry, "distinct_tokens": len(set(text)) / len(text)})


def ttfts_ms(llm: Any, context: int, vocabulary: int) -> list[float]:
    """Return the time to the first token of several prompts, one after the other."""
    times = []
    for seed in range(1, 1 + PROMPTS):
        steps, _ = decode(llm, random_prompts(1, context, vocabulary, seed), 1)
        times.append(1000 * (steps[1].at - steps[0].at))
    return times


def clocked(
    llm: Any, prompts: list[list[int]], k: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the GPU's time and kernels, or why they are not known: the steps' times are kept."""
    try:
        return time_gpu(llm, prompts, k, options.temperature)
    except Exception as error:  # the profiler's or the engine's, whichever it was
        return {"gpu_ms": None, "error": repr(error)}


def num_tokens(steps: int, k: int, rate: float | None) -> int:
    """Return how many tokens a request is to decode for about `steps` steps."""
    return int(steps * tokens_per_step(k, rate or 0.0))


def tokens_per_step(k: int, rate: float) -> float:
    """Return 1 + a + ... + a^k: one token of the base, and the drafts accepted before a miss."""
    return sum(rate**i for i in range(k + 1))


def summarize(entries: list[Entry]) -> list[Entry]:
    """Return a line for each layers, variant, k and streams that has a base beside it."""
    if not entries:
        return []
    context = min(e["context"] for e in entries)
    found: dict[tuple[Any, ...], list[Entry]] = {}
    for e in entries:
        if e["context"] == context:
            key = e["layers"], e["variant"], e["k"], e["streams"]
            found.setdefault(key, []).append(e)
    timed = {key: group for key, group in found.items() if not all(e["clock"] for e in group)}
    return list(_pairs({key: _times(group) for key, group in timed.items()}))


def _times(group: list[Entry]) -> tuple[float, float | None]:
    """Return the medians of the step times and of the GPU's times, of one load."""
    busy = [e["gpu_ms"] for e in group if e["clock"] and e["gpu_ms"] is not None]
    steps = median(e["step_ms"]["median"] for e in group if not e["clock"])
    return steps, median(busy) if busy else None


def _pairs(times: dict[tuple[Any, ...], tuple[float, float | None]]) -> Iterator[Entry]:
    for (layers, variant, k, streams), (step_ms, gpu_ms) in sorted(times.items()):
        base = times.get((layers, "base", 0, streams))
        if k and base is not None:
            line = {"layers": layers, "variant": variant, "k": k, "streams": streams}
            line |= {"step_ms_base": base[0], "step_ms_mtp": step_ms}
            yield {**line, "gpu_ms_base": base[1], "gpu_ms_mtp": gpu_ms}


def main() -> None:
    options = parse_arguments()
    exit_on_sigterm()
    limits = Limits.of(options)
    on_gpu = has_accelerator()
    options.natural |= not on_gpu  # vLLM's CPU sampler has no synthetic acceptance
    done = Measurements(options.out, "step_time", summarize, NOTE if on_gpu else NOTE + CPU_NOTE)
    for job in jobs(options):
        if todo := missing(job, options, done):
            done.run(job.name, limits, measure, job, todo, options, limits.deadline)
    left = sum(len(missing(job, options, done)) for job in jobs(options))
    print(f"{len(done.entries)} measured, {left} missing, {len(done.failures)} failed", flush=True)


if __name__ == "__main__":
    main()
