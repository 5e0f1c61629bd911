"""Time decode steps with and without the head at Flash's width, and say what speed-up to expect.

    python benchmarks/step_time.py --folder FOLDER --out result.json --layers 17 35
    python benchmarks/step_time.py --folder FOLDER --out result.json --layers 43 \\
        --tensor-parallel-size 2 --profile 128k

FOLDER is `flash_width.py`'s. One engine for each number of layers, head and draft LM head; on it
one decode for each k, number of requests and tokens before: `ChosenK` tells the engine how many to
draft. Loads of more than 2^17 tokens are left out. With `--fixed` each k has an engine of its own.
A point that the result has is not measured again. Several of these programs, each with its own
jobs, GPUs and cores, may share one result. Weights are random, so on a GPU vLLM accepts drafts at a
given rate (`synthetic`); text is sampled, because greedy text of random weights repeats one token.
Time to the first token is the median of seven prompts of the shortest context, each alone.

A step of all 43 layers is measured, or extrapolated through two numbers of layers. With the
probability p that a draft is accepted if all before it were,

    speed-up = (1 + p + ... + p^k) x base step time / MTP step time.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import engines
from engines import EngineOptions, counters, decode, random_prompts, started, summarize_steps
from record import add_measurements, arguments, measurements

from mtp_graft.serving.metrics import drafting_result
from mtp_graft.serving.profiles import ON_PCIE, PROFILES, split
from mtp_graft.stages.parallel import gpus, run_in_process

ALL_LAYERS = 43
RATES = (0.6, 0.7, 0.85, 0.95)
#: Tokens a step by k of V4-Pro's own head: InferenceX, coding at temperature 1.
PUBLISHED = {"thinking": {1: 1.79, 2: 2.27, 3: 2.49}, "not thinking": {1: 1.92, 2: 2.61, 3: 2.97}}
NOTE = (
    "Random weights of Flash's width, offline engine, no HTTP, temperature 1. step_ms is the time "
    "between two outputs of the engine while all requests decode."
)
SETTING = ("tensor_parallel_size", "profile", "all_reduce")
Entry = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One engine; `ks` are what it drafts in turn, empty without a head."""

    layers: int
    variant: str  # base, int4 or mxfp4
    ks: tuple[int, ...] = ()
    draft_lm_head: str | None = None  # vLLM's draft_lm_head_quantization


def parse_arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[17, 35])
    parser.add_argument("--variants", nargs="+", default=["base", "int4", "mxfp4"])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--fixed", action="store_true", help="one engine for each k")
    parser.add_argument("--draft-lm-heads", nargs="+", default=["none"], help="none, fp8, nvfp4")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[1000], help="tokens before")
    parser.add_argument("--rate", type=float, default=0.7, help="synthetic acceptance, on a GPU")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--profile", choices=PROFILES, help="its length and number of requests")
    parser.add_argument("--all-reduce", choices=["vllm", "acti"], default="vllm")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--kv-cache-gib", type=float, default=4, help="leaves room to warm up")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    options = parser.parse_args()
    if options.profile:
        most = PROFILES[options.profile].max_num_seqs
        options.requests = [n for n in options.requests if n <= most]
    return options


def jobs(options: argparse.Namespace) -> list[Job]:
    """Return the engines in order of value: the bases first."""
    heads = [None if head == "none" else head for head in options.draft_lm_heads]
    ks = [(k,) for k in options.k] if options.fixed else [tuple(options.k)]
    bases = [Job(layers, "base") for layers in options.layers if "base" in options.variants]
    return bases + [
        Job(layers, variant, together, head)
        for together in ks
        for variant in options.variants
        if variant != "base"
        for head in heads
        for layers in options.layers
    ]


def measure(job: Job, options: argparse.Namespace, _report: Any) -> None:
    """Start the engine and add an entry for each k and number of requests to the result file."""
    began = time.perf_counter()
    engine = engine_options(job, options)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = Path(scratch) / "k"
        chosen.write_text(str(engine.k))
        os.environ[engines.CHOSEN_K] = str(chosen)
        with started(engine) as llm:
            start_s = time.perf_counter() - began
            for point in missing(job, options):
                chosen.write_text(str(point["k"]))
                entry = {**point, "rate": engine.rate, "start_s": start_s}
                entry |= time_steps(llm, engine, point, options)
                print(json.dumps(entry), flush=True)
                add_measurements(options.out, "step_time", [entry], summarize, NOTE)


def engine_options(job: Job, options: argparse.Namespace) -> EngineOptions:
    """Return the engine: one k as vLLM takes it, several with CUDA graphs for each of them."""
    most = max(job.ks, default=0)
    length = max(options.context) + options.steps * (1 + most) + 64
    if options.profile:
        length = PROFILES[options.profile].max_model_len
    more: dict[str, Any] = {}
    drafting = {"draft_sample_method": "probabilistic"} if gpus() else {}  # as `serve` starts it
    if job.variant == "dspark":
        drafting["method"] = "dspark"
    if job.draft_lm_head:
        drafting["draft_lm_head_quantization"] = job.draft_lm_head
    if len(job.ks) > 1:
        last = len(job.ks)  # k by number of requests, which ChosenK overrules
        schedule = [[n, n, k] for n, k in enumerate(job.ks, start=1)]
        schedule[-1][1] = max(last, *options.requests)
        sizes = {n * (1 + k) for n in options.requests for k in (0, *job.ks)}
        drafting["num_speculative_tokens_per_batch_size"] = schedule
        more["scheduler_cls"] = "worker_extension.ChosenK"
        more["compilation_config"] = {"cudagraph_capture_sizes": sorted(sizes)}
    if options.all_reduce == "acti":
        more["disable_custom_all_reduce"] = True
        os.environ |= split(ON_PCIE)[1]
    return EngineOptions(
        options.folder / f"{job.variant}-{job.layers}",
        most,
        max_model_len=length,
        max_num_seqs=max(len(job.ks), *options.requests),
        max_num_batched_tokens=options.max_num_batched_tokens,
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_bytes=int(options.kv_cache_gib * 2**30),
        tensor_parallel_size=options.tensor_parallel_size,
        rate=options.rate if most and gpus() else None,
        drafting=drafting,
        more=more,
    )


def time_steps(
    llm: Any, engine: EngineOptions, point: Entry, options: argparse.Namespace
) -> dict[str, Any]:
    """Decode so many requests at once; return what `summarize_steps` says of it."""
    vocabulary = json.loads((engine.checkpoint / "config.json").read_text())["vocab_size"]
    requests, context = point["requests"], point["context"]
    prompts = random_prompts(requests, context, vocabulary)
    for _ in decode(llm, prompts, 16):
        pass  # compiles what this load needs
    wanted, before = (
        int(options.steps * tokens_per_step(point["k"], engine.rate or 0.0)),
        counters(llm),
    )
    found = summarize_steps(list(decode(llm, prompts, wanted)), requests)
    drafted = drafting_result(counters(llm) - before)["acceptance_by_position"]
    found["acceptance_by_position"] = drafted[: point["k"]]
    if requests == 1 and context == min(options.context):
        alone = random_prompts(8, context, vocabulary, seed=1)
        steps = [list(decode(llm, [prompt], 1)) for prompt in alone]
        found["ttft_ms"] = 1000 * median(first.at - sent.at for sent, first in steps[1:])
    return found


def identity(job: Job, k: int, options: argparse.Namespace) -> Entry:
    """Return what tells a measurement from others, but for the load."""
    entry = {"layers": job.layers, "variant": job.variant, "k": k}
    entry |= {"draft_lm_head": job.draft_lm_head, "fixed": len(job.ks) == 1}
    return entry | {name: getattr(options, name) for name in SETTING}


def missing(job: Job, options: argparse.Namespace) -> list[Entry]:
    """Return each point that the result file does not have."""
    points = [
        identity(job, k, options) | {"requests": requests, "context": context}
        for context in options.context
        for k in job.ks or (0,)
        for requests in options.requests
        if requests * context <= 2**17
    ]
    found = measurements(options.out)
    return [p for p in points if not any(p.items() <= entry.items() for entry in found)]


def summarize(found: list[Entry]) -> dict[str, Any]:
    return {"results": pairs(found), "all_layers": extrapolate(found, ALL_LAYERS)}


def tokens_per_step(k: int, rate: float) -> float:
    """Return 1 + a + ... + a^k: one token of the base, and the drafts accepted before a miss."""
    return sum(rate**i for i in range(k + 1))


def pairs(found: list[Entry]) -> list[Entry]:
    """Return a line for each measurement with a head that has its base beside it."""
    place = ("layers", *SETTING, "requests", "context")
    base = {key(e, *place): e for e in found if e["variant"] == "base"}
    return [
        {name: e[name] for name in ("layers", *SETTING, "variant", "k", "draft_lm_head", "fixed")}
        | {"streams": e["requests"], "context": e["context"]}
        | {"step_ms_base": base[key(e, *place)]["step_ms"]["median"]}
        | {"step_ms_mtp": e["step_ms"]["median"]}
        for e in found
        if e["k"] and key(e, *place) in base
    ]


def key(entry: Entry, *names: str) -> tuple[Any, ...]:
    return tuple(entry[name] for name in names)


def extrapolate(found: list[Entry], layers: int) -> list[Entry]:
    """Return step times at `layers`: as measured, else by a line through the fewest and the most.

    `speed_up` is by rate of acceptance, `published` at the lengths of `PUBLISHED`. A load with one
    number of layers gives no line.
    """
    loads: dict[tuple[Any, ...], list[Entry]] = {}
    for line in pairs(found):
        load = key(line, *SETTING, "variant", "k", "draft_lm_head", "fixed", "streams", "context")
        loads.setdefault(load, []).append(line)
    lines = []
    for group in loads.values():
        few, many = (choose(group, key=lambda line: line["layers"]) for choose in (min, max))
        if few["layers"] == many["layers"] != layers:
            continue
        reach = (layers - many["layers"]) / max(many["layers"] - few["layers"], 1)
        times = {t: many[t] + reach * (many[t] - few[t]) for t in ("step_ms_base", "step_ms_mtp")}
        ratio = times["step_ms_base"] / times["step_ms_mtp"]
        k = many["k"]
        speed_up = {str(rate): tokens_per_step(k, rate) * ratio for rate in RATES}
        published = {name: tokens[k] * ratio for name, tokens in PUBLISHED.items() if k in tokens}
        line = many | times | {"layers": layers, "speed_up": speed_up, "published": published}
        lines.append(line)
    return lines


def main() -> None:
    options = parse_arguments()
    for job in jobs(options):
        if missing(job, options):
            run_in_process(measure, job, options, report=print)


if __name__ == "__main__":
    main()
