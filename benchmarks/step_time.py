"""Time decode steps with and without the head at Flash's width, and say what speed-up to expect.

    python benchmarks/step_time.py --folder FOLDER --out result.json --layers 17 35

FOLDER is `flash_width.py`'s. One engine for each number of layers, head, k and draft LM head; on it
one decode for each number of requests. A point that the result has is not measured again. Several
of these programs, each with its own jobs, GPU and cores, may share one result. Weights are random,
so on a GPU vLLM accepts drafts at a given rate (`synthetic`); text is sampled, because greedy text
of random weights repeats one token.

A step of all 43 layers is extrapolated through the two numbers of layers (`extrapolated`). With the
probability p that a draft is accepted if all before it were,

    speed-up = (1 + p + ... + p^k) x base step time / MTP step time.
"""

import argparse
import fcntl
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import EngineOptions, decode, random_prompts, started, summarize_steps
from record import arguments, write_result

from mtp_graft.pipeline.device import gpus
from mtp_graft.stages.process import run_in_process

ALL_LAYERS = 43
RATES = (0.6, 0.7, 0.85, 0.95)
NOTE = (
    "Random weights of Flash's width, offline engine, no HTTP, temperature 1. step_ms is the time "
    "between two outputs of the engine while all requests decode."
)
Entry = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One engine."""

    layers: int
    variant: str  # base, int4 or mxfp4
    k: int
    draft_lm_head: str | None = None  # vLLM's draft_lm_head_quantization


def parse_arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[17, 35])
    parser.add_argument("--variants", nargs="+", default=["base", "int4", "mxfp4"])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--draft-lm-heads", nargs="+", default=["none"], help="none, fp8, nvfp4")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.7, help="synthetic acceptance, on a GPU")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--kv-cache-gib", type=float, default=4, help="leaves room to warm up")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    return parser.parse_args()


def jobs(options: argparse.Namespace) -> list[Job]:
    """Return the engines in order of value: the bases and the smallest k first."""
    heads = [None if head == "none" else head for head in options.draft_lm_heads]
    bases = [Job(layers, "base", 0) for layers in options.layers if "base" in options.variants]
    return bases + [
        Job(layers, variant, k, head)
        for k in options.k
        for variant in options.variants
        if variant != "base"
        for head in heads
        for layers in options.layers
    ]


def measure(job: Job, options: argparse.Namespace, _report: Any) -> None:
    """Start the engine and add an entry for each number of requests to the result file."""
    began = time.perf_counter()
    checkpoint = options.folder / f"{job.variant}-{job.layers}"
    most = options.steps * (1 + job.k) + 64
    head = {"draft_lm_head_quantization": job.draft_lm_head} if job.draft_lm_head else {}
    engine = EngineOptions(
        *(checkpoint, job.k, options.context + most, max(options.requests)),
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_bytes=int(options.kv_cache_gib * 2**30),
        rate=options.rate if job.k and gpus() else None,
        drafting=head,
    )
    with started(engine) as llm:
        start_s = time.perf_counter() - began
        for requests in missing(job, options):
            entry = {**vars(job), "requests": requests, "rate": engine.rate, "start_s": start_s}
            add(options.out, entry | time_steps(llm, engine, requests, options))


def time_steps(
    llm: Any, engine: EngineOptions, requests: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Decode so many requests at once; return what `summarize_steps` says of it."""
    vocabulary = json.loads((engine.checkpoint / "config.json").read_text())["vocab_size"]
    prompts = random_prompts(requests, options.context, vocabulary)
    for _ in decode(llm, prompts, 16, temperature=1.0):
        pass  # compiles what this load needs
    wanted = int(options.steps * tokens_per_step(engine.k, engine.rate or 0.0))
    return summarize_steps(list(decode(llm, prompts, wanted, temperature=1.0)), requests)


def missing(job: Job, options: argparse.Namespace) -> list[int]:
    """Return the numbers of requests that the result file does not have."""
    have = [e["requests"] for e in entries(options.out) if vars(job).items() <= e.items()]
    return [requests for requests in options.requests if requests not in have]


def entries(path: Path) -> list[Entry]:
    return json.loads(path.read_text())["measurements"] if path.exists() else []


def add(path: Path, entry: Entry) -> None:
    print(json.dumps(entry), flush=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = [*entries(path), entry]
        more = {"extrapolated": extrapolate(found, ALL_LAYERS), "measurements": found}
        write_result(path, "step_time", pairs(found), note=NOTE, **more)


def tokens_per_step(k: int, rate: float) -> float:
    """Return 1 + a + ... + a^k: one token of the base, and the drafts accepted before a miss."""
    return sum(rate**i for i in range(k + 1))


def pairs(found: list[Entry]) -> list[Entry]:
    """Return a line for each measurement with a head that has its base beside it."""
    base = {
        (e["layers"], e["requests"]): e["step_ms"]["median"]
        for e in found
        if e["variant"] == "base"
    }
    return [
        {name: e[name] for name in ("layers", "variant", "k", "draft_lm_head")}
        | {"streams": e["requests"], "step_ms_base": base[e["layers"], e["requests"]]}
        | {"step_ms_mtp": e["step_ms"]["median"]}
        for e in found
        if e["k"] and (e["layers"], e["requests"]) in base
    ]


def extrapolate(found: list[Entry], layers: int) -> list[Entry]:
    """Return step times at `layers` by a line through the fewest and the most layers measured.

    `speed_up` is by rate of acceptance. A load with one number of layers gives no line.
    """
    loads: dict[tuple[Any, ...], list[Entry]] = {}
    for line in pairs(found):
        key = line["variant"], line["k"], line["draft_lm_head"], line["streams"]
        loads.setdefault(key, []).append(line)
    lines = []
    for group in loads.values():
        few, many = (choose(group, key=lambda line: line["layers"]) for choose in (min, max))
        if few["layers"] == many["layers"]:
            continue
        reach = (layers - many["layers"]) / (many["layers"] - few["layers"])
        times = {t: many[t] + reach * (many[t] - few[t]) for t in ("step_ms_base", "step_ms_mtp")}
        ratio = times["step_ms_base"] / times["step_ms_mtp"]
        speed_up = {str(rate): tokens_per_step(many["k"], rate) * ratio for rate in RATES}
        lines.append(many | {"layers": layers, "speed_up": speed_up} | times)
    return lines


def main() -> None:
    options = parse_arguments()
    for job in jobs(options):
        if missing(job, options):
            run_in_process(measure, job, options, report=print)


if __name__ == "__main__":
    main()
