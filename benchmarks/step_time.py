"""Time decode steps with and without the head at Flash's width, and say what speed-up to expect.

    python benchmarks/step_time.py --folder FOLDER --out result.json --layers 31
    python benchmarks/step_time.py --folder FOLDER --out result.json --layers 43 \\
        --tensor-parallel-size 2 --profile 128k

FOLDER is `flash_width.py`'s. One engine for each number of layers, head and draft LM head; on it
one decode for each k, number of requests and tokens before: `ChosenK` tells the engine how many to
draft. With `--fixed` each k has an engine of its own, as DSpark's has to. Loads of more than 2^16
tokens are left out, and so is a point that the result has. Several of these programs, each with its
own jobs, GPUs and cores, may share one result. Ranks on a CPU need VLLM_CPU_OMP_THREADS_BIND='0|1'.
Weights are random, so on a GPU vLLM accepts drafts at a given rate (`synthetic`); text is sampled,
because greedy text of random weights repeats one token. Time to the first token is the median of
seven prompts of the shortest context, each alone.

The speed-up to expect is tokens per step x base step time / step time with drafts. A drafter costs
the same behind 31 layers as behind all 43, so fewer layers give too low a speed-up.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from operator import itemgetter
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
STEPS, RATE = 128, 0.7  # of a decode; of synthetic acceptance, on a GPU
#: Tokens a step by k of V4-Pro's own drafters: InferenceX, coding at temperature 1.
MTP = {"thinking": {1: 1.79, 2: 2.27, 3: 2.49}, "not thinking": {1: 1.92, 2: 2.61, 3: 2.97}}
DSPARK = {"thinking": {3: 3.08, 5: 3.74}, "not thinking": {3: 3.47, 5: 4.52}}
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
    variant: str  # base, int4, mxfp4 or dspark
    ks: tuple[int, ...] = ()
    draft_lm_head: str | None = None  # vLLM's draft_lm_head_quantization


def parse_arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[ALL_LAYERS])
    parser.add_argument("--variants", nargs="+", default=["base", "int4", "mxfp4"])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--fixed", action="store_true", help="one engine for each k")
    parser.add_argument("--draft-lm-head", help="fp8 or nvfp4, else the base's own")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[1000], help="tokens before")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--profile", choices=PROFILES, help="its length and number of requests")
    parser.add_argument("--all-reduce", choices=["vllm", "acti"], default="vllm")
    parser.add_argument("--kv-cache-gib", type=float, default=4, help="leaves room to warm up")
    parser.add_argument("--batched-tokens", type=int, default=8192, help="of a step, at most")
    options = parser.parse_args()
    if options.profile:
        most = PROFILES[options.profile].max_num_seqs
        options.requests = [n for n in options.requests if n <= most]
    return options


def jobs(options: argparse.Namespace) -> list[Job]:
    """Return the engines in order of value: the bases first."""
    ks = [(k,) for k in options.k] if options.fixed else [tuple(options.k)]
    bases = [Job(layers, "base") for layers in options.layers if "base" in options.variants]
    return bases + [
        Job(layers, variant, together, options.draft_lm_head)
        for together in ks
        for variant in options.variants
        if variant != "base"
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
    length = max(options.context) + STEPS * (1 + most) + 64
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
        max_num_batched_tokens=options.batched_tokens,
        gpu_memory_utilization=0.92,
        kv_cache_bytes=int(options.kv_cache_gib * 2**30),
        tensor_parallel_size=options.tensor_parallel_size,
        rate=RATE if most and gpus() else None,
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
    before, tokens_per_step = (
        counters(llm),
        sum((engine.rate or 0) ** i for i in range(1 + point["k"])),
    )
    steps = decode(llm, prompts, int(STEPS * tokens_per_step))
    found = summarize_steps(list(steps), requests)
    drafted = drafting_result(counters(llm) - before)["acceptance_by_position"]
    found["acceptance_by_position"] = drafted[: point["k"]]
    if requests == 1 and context == min(options.context):
        alone = random_prompts(8, context, vocabulary, seed=1)
        steps = [list(decode(llm, [prompt], 1)) for prompt in alone]
        found["ttft_ms"] = 1000 * median(first.at - sent.at for sent, first in steps[1:])
    return found


def missing(job: Job, options: argparse.Namespace) -> list[Entry]:
    """Return each point that the result file does not have."""
    what = {"layers": job.layers, "variant": job.variant, "draft_lm_head": job.draft_lm_head}
    what |= {"fixed": len(job.ks) == 1} | {name: getattr(options, name) for name in SETTING}
    points = [
        what | {"k": k, "requests": requests, "context": context}
        for context in options.context
        for k in job.ks or (0,)
        for requests in options.requests
        if requests * context <= 2**16
    ]
    found = measurements(options.out)
    return [p for p in points if not any(p.items() <= entry.items() for entry in found)]


def summarize(found: list[Entry]) -> dict[str, list[Entry]]:
    """Return a line for each step with drafts, and what speed-up to expect of it."""
    return {"results": [line | {"published": speed_ups(line)} for line in pairs(found)]}


def pairs(found: list[Entry]) -> list[Entry]:
    """Return a line for each measurement with a head that has its base beside it."""
    place = itemgetter("layers", *SETTING, "requests", "context")
    base = {place(e): e for e in found if e["variant"] == "base"}
    return [
        {name: e[name] for name in ("layers", *SETTING, "variant", "k", "draft_lm_head", "fixed")}
        | {"streams": e["requests"], "context": e["context"]}
        | {"step_ms_base": base[place(e)]["step_ms"]["median"]}
        | {"step_ms_mtp": e["step_ms"]["median"]}
        for e in found
        if e["k"] and place(e) in base
    ]


def speed_ups(line: Entry) -> dict[str, float]:
    """Return the speed-up to expect at each of the published tokens a step."""
    ratio, k = line["step_ms_base"] / line["step_ms_mtp"], line["k"]
    published = DSPARK if line["variant"] == "dspark" else MTP
    return {name: tokens[k] * ratio for name, tokens in published.items() if k in tokens}


def main() -> None:
    options = parse_arguments()
    for job in jobs(options):
        if missing(job, options):
            run_in_process(measure, job, options, report=print)


if __name__ == "__main__":
    main()
