"""Run a base and its spliced checkpoint on stock vLLM plus the plugin; compare text and speed.

    python benchmarks/engine_check.py --base DIR --spliced DIR --out FILE [--k 0 1 2] [--tp 2]

Every engine runs in a process of its own, greedy, one request at a time, on the same prompts
(token ids, a JSON list of lists; random ids when not given). The result has, per number of
speculative tokens k, decode speed, acceptance and start-up time, and per k > 0 every position at
which the text left the base's, with the base's margin there.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from record import device_name, write_result


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
    return parser.parse_args()


def random_prompts() -> list[list[int]]:
    """Return prompts of 5, 130, 300 and 1,500 random token ids."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 4000, (n,), generator=generator).tolist() for n in (5, 130, 300, 1500)]


def run_engine(options: argparse.Namespace, k: int, prompts: list[list[int]]) -> dict[str, Any]:
    """Start one engine, warm it up, decode every prompt `rounds` times; return what was seen."""
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {
        "model": str(options.spliced if k else options.base),
        "skip_tokenizer_init": True,
        "kv_cache_dtype": "fp8",
        "block_size": 256,
        "max_model_len": options.max_model_len,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "enforce_eager": options.eager,
        "tensor_parallel_size": options.tp,
        "disable_log_stats": False,
    }
    if k:
        settings["speculative_config"] = {"method": "mtp", "num_speculative_tokens": k}
    if platform_name() == "cpu":
        settings["kv_cache_memory_bytes"] = 2**29
        if options.tp > 1:
            cores = sorted(os.sched_getaffinity(0))[: options.tp]
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores))
    else:
        settings["gpu_memory_utilization"] = options.gpu_memory_utilization
    started = time.perf_counter()
    llm = LLM(**settings)
    start_seconds = time.perf_counter() - started

    def sampling(tokens: int, logprobs: int | None = None) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )

    def timed(prompt: list[int], tokens: int) -> float:
        begin = time.perf_counter()
        llm.generate({"prompt_token_ids": prompt}, sampling(tokens), use_tqdm=False)
        return time.perf_counter() - begin

    texts = []
    for prompt in prompts:
        request = {"prompt_token_ids": prompt}
        output = llm.generate(request, sampling(options.max_tokens, 2), use_tqdm=False)[0].outputs[
            0
        ]
        tops = [
            sorted((v.logprob for v in step.values()), reverse=True) for step in output.logprobs
        ]
        margins = [top[0] - top[1] if len(top) > 1 else None for top in tops]
        texts.append({"tokens": list(output.token_ids), "margins": margins})

    before = counters(llm)
    speeds = []
    for _ in range(options.rounds):
        for prompt in prompts:
            decode = timed(prompt, options.max_tokens) - timed(prompt, 1)
            speeds.append((options.max_tokens - 1) / decode)
    after = counters(llm)
    drafted = after["drafted"] - before["drafted"]
    return {
        "start_seconds": start_seconds,
        "texts": texts,
        "decode_tok_s": {
            "median": statistics.median(speeds),
            "min": min(speeds),
            "max": max(speeds),
            "runs": len(speeds),
        },
        "drafted": drafted,
        "accepted": after["accepted"] - before["accepted"],
        "acceptance": (after["accepted"] - before["accepted"]) / drafted if drafted else None,
    }


def counters(llm: Any) -> dict[str, float]:
    """Return the engine's own speculative decoding counters."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {
        "drafted": values.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": values.get("vllm:spec_decode_num_accepted_tokens", 0),
    }


def divergences(base: list[Any], other: list[Any]) -> list[dict[str, Any]]:
    """Return the first position of every prompt at which `other` left the base's text."""
    found = []
    for prompt, (expected, actual) in enumerate(zip(base, other, strict=True)):
        pairs = enumerate(zip(expected["tokens"], actual["tokens"], strict=True))
        position = next((i for i, (a, b) in pairs if a != b), None)
        if position is not None:
            margin = expected["margins"][position]
            found.append({"prompt": prompt, "position": position, "margin": margin})
    return found


def platform_name() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def _child(queue: Any, options: argparse.Namespace, k: int, prompts: list[list[int]]) -> None:
    queue.put((run_engine(options, k, prompts), device_name()))


def main() -> None:
    options = parse_arguments()
    prompts = json.loads(options.prompts.read_text()) if options.prompts else random_prompts()
    context = multiprocessing.get_context("spawn")
    runs: dict[str, Any] = {}
    device = "unknown"
    for k in options.k:
        queue = context.Queue()
        process = context.Process(target=_child, args=(queue, options, k, prompts))
        process.start()
        while process.is_alive() and queue.empty():
            time.sleep(0.2)
        if queue.empty():
            process.join()
            sys.exit(f"engine_check: the engine with k = {k} died with status {process.exitcode}")
        runs[str(k)], device = queue.get()
        process.join(60)
        process.kill()  # an engine in a process of its own may hang at the exit on a CPU
        summary = {name: value for name, value in runs[str(k)].items() if name != "texts"}
        print(f"k = {k}: {json.dumps(summary)}", flush=True)
        write_report(options, runs, device, len(prompts))


def write_report(
    options: argparse.Namespace, runs: dict[str, Any], device: str, num_prompts: int
) -> None:
    """Write what has been measured so far, with the divergences of every k from the base."""
    results: dict[str, Any] = {}
    for k, run in runs.items():
        results[k] = {name: value for name, value in run.items() if name != "texts"}
        if k != "0" and "0" in runs:
            results[k]["divergences"] = divergences(runs["0"]["texts"], run["texts"])
            results[k]["prompts"] = num_prompts
    write_result(options.out, options.benchmark, results, device=device)


if __name__ == "__main__":
    main()
