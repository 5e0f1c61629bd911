"""Run a base and its spliced checkpoint on stock vLLM plus the plugin; compare text and speed.

    python benchmarks/engine_check.py --base DIR --spliced DIR --out FILE [--k 0 1 2] [--tp 2]

Every engine runs in a process of its own, greedy, one request at a time, on the same prompts
(token ids, a JSON list of lists; random ids when not given). The result has, per number of
speculative tokens k, decode speed, acceptance and start-up time, and per k > 0 every position at
which the text left the base's, with the base's margin there.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from engines import EngineOptions, Send, counters, exit_on_sigterm, gained, start
from measurements import Entry, Limits, Measurements
from texts import divergences, generate, greedy

LENGTHS = (5, 130, 300, 1500)
NOTE = "Greedy, one request at a time, offline engine. decode_tok_s is without the first token."


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--spliced", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, help="JSON list of token id lists")
    parser.add_argument("--k", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tp", type=int, default=1, help="ranks")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.5)
    parser.add_argument("--benchmark", default="engine_check")
    Limits.add_options(parser)
    return parser.parse_args()


def random_prompts() -> list[list[int]]:
    """Return prompts of random token ids, of each of LENGTHS."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 4000, (n,), generator=generator).tolist() for n in LENGTHS]


def observe(
    send: Send, engine: EngineOptions, prompts: list[list[int]], max_tokens: int, rounds: int
) -> None:
    """Start the engine, let it write all texts, then time each `rounds` times."""
    began = time.perf_counter()
    llm = start(engine)
    start_seconds = time.perf_counter() - began
    texts = greedy(llm, prompts, max_tokens)

    def timed(prompt: list[int], tokens: int) -> float:
        begin = time.perf_counter()
        generate(llm, prompt, tokens)
        return time.perf_counter() - begin

    before = counters(llm)
    speeds = [
        (max_tokens - 1) / (timed(prompt, max_tokens) - timed(prompt, 1))
        for _ in range(rounds)
        for prompt in prompts
    ]
    spread = {"min": min(speeds), "max": max(speeds), "runs": len(speeds)}
    decode = {"median": statistics.median(speeds), **spread}
    found = {"start_seconds": start_seconds, "decode_tok_s": decode, "texts": texts}
    send({"k": engine.k, **found, **gained(before, counters(llm))})


def summarize(entries: list[Entry]) -> dict[str, Any]:
    """Return what was seen with each k, and where its text left the base's."""
    results: dict[str, Any] = {}
    base = next((entry for entry in entries if entry["k"] == 0), None)
    for entry in entries:
        line = {name: value for name, value in entry.items() if name not in ("k", "texts")}
        if entry["k"] and base is not None:
            line["divergences"] = divergences(base["texts"], entry["texts"])
            line["prompts"] = len(entry["texts"])
        results[str(entry["k"])] = line
    return results


def main() -> None:
    options = parse_arguments()
    exit_on_sigterm()
    limits = Limits.of(options)
    prompts = json.loads(options.prompts.read_text()) if options.prompts else random_prompts()
    done = Measurements(options.out, options.benchmark, summarize, NOTE)
    for k in options.k:
        engine = EngineOptions(
            options.spliced if k else options.base,
            k,
            options.max_model_len,
            max_num_seqs=4,
            gpu_memory_utilization=options.gpu_memory_utilization,
            tensor_parallel_size=options.tp,
            eager=options.eager,
        )
        if not done.has(k=k):
            done.run(f"k{k}", limits, observe, engine, prompts, options.max_tokens, options.rounds)


if __name__ == "__main__":
    main()
