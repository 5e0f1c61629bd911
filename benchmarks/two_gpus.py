"""Acti's deployment shape: two ranks, in four parts that can be asked for by name.

    python benchmarks/two_gpus.py tiny speed ttft quantize --folder FOLDER --out result.json

tiny      the bundled model: one rank's greedy text, read by one rank and by two (teacher-forced),
          by one rank that rounds as two would, and the text with the head against the text without,
          both on two ranks
speed     FOLDER/base-N and FOLDER/int4-N of `flash_width.py` on two ranks, in the profiles'
          settings: speed at synthetic acceptance for one stream, and for 1 to 8 streams; with
          --stock-graphs without the CUDA graph sizes that `serve` adds
ttft      the same checkpoints: time to the first token of one stream, and its steps, by how the
          ranks' sums are taken: `ALL_REDUCE`, Acti's NCCL variables among them
quantize  the stage on `synthetic_flash.py`'s input in FOLDER/quantize (made if it is not there), on
          one rank and on two: are the files the same, byte for byte?

Without GPUs all of it runs in small, on two ranks of the CPU over gloo.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import synthetic_flash
from engines import EngineOptions, exit_on_sigterm, has_accelerator, start
from gpu_serve_check import MODEL
from measurements import Entry, Limits, Measurements
from mtp_graft.serving.graphs import missing_sizes
from step_time import Point, clocks, measure_points
from texts import bundled_prompts, compare_forced, divergences, forced, greedy, tokens_of

from mtp_graft.serving.command import find_vllm
from mtp_graft.serving.profiles import (
    MAX_NUM_BATCHED_TOKENS,
    NCCL_LATENCY,
    NCCL_SHARED_MEMORY,
    PROFILES,
    Setting,
)
from mtp_graft.stages.splice import splice

HERE = Path(__file__).resolve().parent
NOTE = (
    "Several ranks on one host. Flash's width: random weights, offline engine, and layers after "
    "the fifth are loaded from copies through vLLM's own weight loaders, so no whole 146 GB "
    "checkpoint was read. Of more streams than a profile has seats, the others wait."
)
CPU_NOTE = " A small form on two shared CPU cores: it shows that the script runs, no speed."
#: Tokens of a short prompt, in `ttft` beside --context: sums of less than 1 MB.
SHORT = 100


@dataclass(frozen=True)
class AllReduce:
    """How ranks on GPUs add up what each has: by vLLM's own kernel, or by NCCL as it is told."""

    own_kernel: bool
    nccl: tuple[Setting, ...] = ()


ALL_REDUCE = {
    "acti": AllReduce(own_kernel=False, nccl=NCCL_SHARED_MEMORY + NCCL_LATENCY),
    "shm": AllReduce(own_kernel=False, nccl=NCCL_SHARED_MEMORY),  # as without peer access
    "vllm": AllReduce(own_kernel=True),
    "nccl": AllReduce(own_kernel=False),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=43)
    parser.add_argument("--profiles", nargs="+", default=["524k", "128k", "256k"])
    parser.add_argument("--cap-context", type=int, default=2**20, help="shorter than the profile's")
    parser.add_argument("--context", type=int, default=1000, help="tokens of each prompt")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.7, 0.85, 0.95])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--sweep-rate", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64, help="of each text in `tiny`")
    parser.add_argument("--tokens", type=int, default=40_000, help="captured tokens in `quantize`")
    parser.add_argument("--variants", nargs="+", default=["base", "int4"], help="in speed, ttft")
    parser.add_argument("--all-reduce", nargs="+", choices=ALL_REDUCE, default=[*ALL_REDUCE])
    parser.add_argument("--stock-graphs", action="store_true", help="without serve's graph sizes")
    parser.add_argument("--small", action="store_true", help="`quantize` in small, for a CPU")
    parser.add_argument("--no-clock", action="store_true", help="do not profile the GPUs")
    Limits.add_options(parser)
    options = parser.parse_args()
    options.temperature = 1.0
    return options


def tiny(done: Measurements, options: argparse.Namespace) -> None:
    spliced = options.folder / "tiny-mxfp4"
    splice(MODEL / "base", MODEL / "upstream", spliced, "mxfp4")
    prompts = bundled_prompts(MODEL, 8, 700)
    base = MODEL / "base"
    jobs = (
        ("tiny", base, 0, 1),
        ("tiny-rounded", base, 0, 1),
        ("tiny", base, 0, options.ranks),
        ("tiny", spliced, 1, options.ranks),
    )
    for part, checkpoint, k, ranks in jobs:
        identity = {"part": part, "ranks": ranks, "k": k}
        if not done.has(**identity):
            rounded = part == "tiny-rounded"
            engine = EngineOptions(checkpoint, k, 4096, 4, 4096, 0.4, ranks, eager=rounded)
            first = done.find(part="tiny", ranks=1, k=0)
            arguments = (engine, prompts, options.max_tokens, first and first["texts"], identity)
            work = read_rounded if rounded else write_and_read
            done.run(f"{part}-tp{ranks}-k{k}", options.limits, work, *arguments)


def write_and_read(
    send: Callable[[Any], None],
    engine: EngineOptions,
    prompts: list[list[int]],
    max_tokens: int,
    first: list[Any] | None,
    identity: Entry,
) -> None:
    """Send greedy texts and, without the head, the best tokens along `first` or along these."""
    llm = start(engine)
    texts = greedy(llm, prompts, max_tokens)
    read = None if engine.k else forced(llm, prompts, first or texts)
    send({**identity, "texts": texts, "read": read})


def read_rounded(
    send: Callable[[Any], None],
    engine: EngineOptions,
    prompts: list[list[int]],
    _max_tokens: int,
    first: list[Any] | None,
    identity: Entry,
) -> None:
    """Send the best tokens along `first`, of an engine as it is and one that rounds as two do."""
    if first is None:
        raise ValueError("there is no text of one rank")
    llm = start(engine)
    read = forced(llm, prompts, first)
    modules = llm.collective_rpc("round_as_two_ranks")[0]
    rounded = forced(llm, prompts, first)
    send({**identity, "read": read, "rounded": rounded, "modules": len(modules)})


def speed(done: Measurements, options: argparse.Namespace) -> None:
    single = [Point(1, options.context, rate) for rate in options.rates]
    sweep = [Point(n, options.context, options.sweep_rate) for n in options.streams]
    for name in options.profiles:
        for variant in options.variants:
            k = 0 if variant == "base" else 1
            wanted = dict.fromkeys(sweep + single)  # ordered, each once
            if k == 0 or not has_accelerator():
                wanted = dict.fromkeys(Point(p.streams, p.context, None) for p in wanted)
            identity = {"part": "speed", "profile": name, "layers": options.layers}
            identity |= {"ranks": options.ranks, "variant": variant, "k": k}
            identity["stock_graphs"] = options.stock_graphs
            seated = (p for p in wanted if p.streams <= PROFILES[name].max_num_seqs)
            wanted |= dict.fromkeys(clocks(seated, options))
            todo = [p for p in wanted if not done.has(**identity, **vars(p))]
            if todo:
                how = "-stock" * options.stock_graphs
                job = f"speed-{name}-tp{options.ranks}{how}-{variant}-k{k}"
                done.run(job, options.limits, measure_profile, identity, todo, options)


def ttft(done: Measurements, options: argparse.Namespace) -> None:
    for name, way, variant in product(options.profiles, options.all_reduce, options.variants):
        k = 0 if variant == "base" else 1
        rate = options.sweep_rate if k and has_accelerator() else None
        points = dict.fromkeys(Point(1, n, rate) for n in (SHORT, options.context))
        identity = {"part": "ttft", "all_reduce": way, "profile": name, "layers": options.layers}
        identity |= {"ranks": options.ranks, "variant": variant, "k": k, "stock_graphs": False}
        if todo := [p for p in points if not done.has(**identity, **vars(p))]:
            job = f"ttft-{name}-tp{options.ranks}-{way}-{variant}-k{k}"
            done.run(job, options.limits, measure_profile, identity, todo, options)


def measure_profile(
    send: Callable[[Any], None], identity: Entry, todo: list[Point], options: argparse.Namespace
) -> None:
    all_reduce = ALL_REDUCE[identity.get("all_reduce", "vllm")]
    os.environ.update({str(setting.name): str(setting.value) for setting in all_reduce.nccl})
    profile = PROFILES[identity["profile"]]
    checkpoint = options.folder / f"{identity['variant']}-{options.layers}"
    length = min(profile.max_model_len, options.cap_context)
    sizes = missing_sizes(profile.max_num_seqs, identity["k"], find_vllm().version)
    engine = EngineOptions(
        *(checkpoint, identity["k"], length, profile.max_num_seqs, MAX_NUM_BATCHED_TOKENS),
        *(profile.gpu_memory_utilization, options.ranks),
        rate=max(options.rates) if identity["k"] and has_accelerator() else None,
        graph_sizes=() if identity["stock_graphs"] else tuple(sizes),
        custom_all_reduce=all_reduce.own_kernel,
    )
    began = time.perf_counter()
    llm = start(engine)
    identity |= {"seats": profile.max_num_seqs, "start_s": time.perf_counter() - began}
    measure_points(send, llm, checkpoint, identity, todo, options, options.limits.deadline)


def quantize(done: Measurements, options: argparse.Namespace) -> None:
    folder = options.folder / "quantize"
    if not (folder / "upstream" / "model.safetensors.index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        config = synthetic_flash.TINY if options.small else synthetic_flash.FLASH
        sequence = 128 if options.small else synthetic_flash.SEQUENCE
        synthetic_flash.generate(folder, config, options.tokens, sequence)
    for ranks in (1, options.ranks):
        job = f"quantize-{ranks}"
        if done.has(part="quantize", ranks=ranks):
            continue
        if options.limits.deadline.passed(options.start_s):
            print(f"{options.limits.deadline.left():.0f} s left: {job} is not begun", flush=True)
            continue
        done.forget_failure(job)
        try:
            done.add(quantize_on(folder, ranks, options.limits.deadline.left()))
        except (subprocess.SubprocessError, OSError) as error:
            done.fail(job, repr(error))


def quantize_on(folder: Path, ranks: int, limit_s: float) -> Entry:
    """Run the stage on so many ranks; return its times and the hashes of its tensors."""
    run = folder / f"run-{ranks}"
    shutil.rmtree(run, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = str(HERE / "quantize_full.py")
    command = [sys.executable, *(launcher if ranks > 1 else ()), script, "--input", str(folder)]
    command += ["--out", "-", "--stage-run", str(run)]  # torchrun takes "--run" for its own
    path = os.pathsep.join(filter(None, (str(HERE.parent / "src"), os.environ.get("PYTHONPATH"))))
    began = time.perf_counter()
    limit = None if limit_s == float("inf") else max(limit_s, 1) + 60
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, timeout=limit)
    report = json.loads((run / "report.json").read_text())
    return {
        "part": "quantize",
        "ranks": ranks,
        "process_s": time.perf_counter() - began,
        "seconds": report["seconds"],
        "sha256": hashes(run),
    }


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of tensors below `folder`."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb") as stream:
            found[str(file.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def summarize(entries: list[Entry]) -> dict[str, Any]:
    """Return the comparisons that what was measured so far allows."""
    quantized = [e for e in entries if e["part"] == "quantize"]
    result = summarize_texts([e for e in entries if e["part"].startswith("tiny")])
    if speeds := [e for e in entries if e["part"] == "speed"]:
        result["speed"] = speed_lines(speeds)
    if first_tokens := [e for e in entries if e["part"] == "ttft"]:
        result["ttft"] = [ttft_line(e) for e in first_tokens]
    if len(quantized) > 1:
        same = all(e["sha256"] == quantized[0]["sha256"] for e in quantized)
        result["quantize"] = {
            "byte_identical": same,
            "files": len(quantized[0]["sha256"]),
            "process_s": {str(e["ranks"]): e["process_s"] for e in quantized},
        }
    return result


def summarize_texts(entries: list[Entry]) -> dict[str, Any]:
    """Return how the tiny model's texts differ: the ranks', and for comparison one rank's own.

    `tiny_written_and_read` is one rank's decode steps against its prefill, `tiny_rounded` its
    prefill against one that rounds as two ranks round.
    """
    result: dict[str, Any] = {}
    texts = {(e["ranks"], e["k"]): e for e in entries if e["part"] == "tiny"}
    for e in entries:
        if e["part"] == "tiny-rounded":
            result["tiny_rounded"] = compare_forced(e["read"], tokens_of(e["rounded"]))
    if one := texts.get((1, 0)):
        read = tokens_of(one["read"])
        result["tiny_written_and_read"] = compare_forced(one["texts"], read)
    for (ranks, k), entry in texts.items():
        if one and ranks > 1 and not k:
            best = tokens_of(entry["read"])
            result["tiny_teacher_forced"] = compare_forced(one["read"], best)
        if k and (base := texts.get((ranks, 0))):
            result["tiny_mtp_divergences"] = divergences(base["texts"], entry["texts"])
    return result


def speed_lines(entries: list[Entry]) -> list[Entry]:
    """Return MTP beside its base, and whether a load brings less than the next smaller one."""
    entries = [e for e in entries if not e.get("clock")]
    setting = ("layers", "ranks", "stock_graphs", "profile")
    base = {_key(e, *setting, "streams"): e for e in entries if e["variant"] == "base"}
    lines = []
    for e in entries:
        other = base.get(_key(e, *setting, "streams"))
        if e["k"] and other:
            line = {name: e.get(name) for name in (*setting, "streams", "rate", "acceptance")}
            for kind, entry in (("base", other), ("mtp", e)):
                line[f"ttft_ms_{kind}"] = ttft_ms(entry)
                line[f"step_ms_{kind}"] = entry["step_ms"]["median"]
            line |= {"base_tok_s": other["aggregate_tok_s"], "mtp_tok_s": e["aggregate_tok_s"]}
            line["ratio"] = line["mtp_tok_s"] / line["base_tok_s"]
            lines.append(line)
    for line in lines:
        key = _key(line, *setting, "rate")
        fewer = [o for o in lines if _key(o, *setting, "rate") == key]
        fewer = [o for o in fewer if o["streams"] < line["streams"]]
        if fewer:
            before = max(fewer, key=lambda o: o["streams"])
            line["dips"] = line["mtp_tok_s"] < before["mtp_tok_s"]
    return lines


def ttft_line(entry: Entry) -> Entry:
    setting = ("layers", "ranks", "profile", "all_reduce", "variant", "k", "context", "acceptance")
    times = {"ttft_ms": ttft_ms(entry), "step_ms": entry["step_ms"]["median"]}
    return {name: entry[name] for name in setting} | times


def ttft_ms(entry: Entry) -> float | None:
    """Return the median of several prompts, or what one decode took if no more is known."""
    return median(entry["ttfts_ms"]) if "ttfts_ms" in entry else entry.get("ttft_ms")


def _key(entry: Entry, *names: str) -> tuple[Any, ...]:
    return tuple(entry.get(name) for name in names)  # older entries lack some


PARTS = {"tiny": tiny, "speed": speed, "ttft": ttft, "quantize": quantize}


def main() -> None:
    options = parse_arguments()
    exit_on_sigterm()
    options.limits = Limits.of(options)
    note = NOTE if has_accelerator() else NOTE + CPU_NOTE
    name = "two_ranks" if options.ranks == 2 else f"{options.ranks}_ranks"
    done = Measurements(options.out, name, summarize, note)
    for part in options.parts:
        try:
            PARTS[part](done, options)
        except Exception as error:  # the other parts are worth having
            done.fail(part, repr(error))
    print(f"{len(done.entries)} measured, {len(done.failures)} failed", flush=True)


if __name__ == "__main__":
    main()
