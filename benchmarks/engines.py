"""vLLM engines for the benchmarks: each in a process of its own, driven one step at a time.

The engine is vLLM's offline one. Its core runs in yet another process and does not wait for us, so
the time between two of its outputs is the time of a step, scheduling and sampling included. What an
HTTP server adds is not in it.
"""

import json
import multiprocessing
import os
import queue
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from layers import NUM_STORED

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "VLLM_PLUGINS": "mtp_graft",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # as `vllm serve` starts its engine
    "TEARDOWN_CUPTI": "0",  # one profile may follow another (gpu_clock.py)
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1200",  # of several ranks: the first step compiles
    **{"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0"},  # shared hosts may forbid
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",  # NVLink multicast
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
#: Steps at the beginning of a decode that are not counted.
SETTLING = 4


class EngineFailed(Exception):
    """An engine died, hung or raised; the message is the end of what it said."""


@dataclass(frozen=True)
class EngineOptions:
    """One engine; `rate` turns synthetic acceptance on, which only a GPU has."""

    checkpoint: Path
    k: int = 0
    max_model_len: int = 4096
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None  # None: what the share of the memory leaves
    tensor_parallel_size: int = 1
    rate: float | None = None
    eager: bool = False


@dataclass(frozen=True)
class Step:
    """One output of the engine: when it came, and how many tokens each request got."""

    at: float  # seconds
    tokens: dict[str, int]


Send = Callable[[Any], None]


def in_child(
    work: Callable[..., None], *args: Any, log: Path, stall_s: float = 420.0
) -> Iterator[Any]:
    """Yield what `work(send, *args)` sends from a process of its own, while it runs.

    Raises EngineFailed if it raises, dies, or sends nothing for `stall_s` seconds, after its start
    for a third of that. The process and all that it started are gone when the iteration ends,
    however it ends.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    process = context.Process(target=_child, args=(messages, work, args, str(log)))
    process.start()
    heard, silence_s = time.monotonic(), stall_s
    try:
        while True:
            try:
                kind, value = messages.get(timeout=0.5)
            except queue.Empty:
                if not process.is_alive() and messages.empty():
                    raise EngineFailed(f"exit status {process.exitcode}; {_tail(log)}") from None
                if time.monotonic() - heard > silence_s:
                    raise EngineFailed(f"silent for {silence_s:.0f} s; {_tail(log)}") from None
                continue
            heard, silence_s = time.monotonic(), stall_s / 3
            if kind == "done":
                return
            if kind == "raised":
                raise EngineFailed(f"{value}\n{_tail(log)}")
            yield value
    finally:
        # An engine in a process of its own may hang at its exit on a CPU: it is not waited for.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind this process, so that no engine outlives it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))


def _child(messages: Any, work: Callable[..., None], args: tuple[Any, ...], log: str) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    paths = [str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    try:
        work(lambda value: messages.put(("value", value)), *args)
    except Exception:
        messages.put(("raised", traceback.format_exc(limit=-4)))
    else:
        messages.put(("done", None))


def _tail(log: Path, lines: int = 12) -> str:
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [line for line in said if "Error" in line][-4:]
    return "\n".join([f"{log}:", *errors, *said[-lines:]])


def start(options: EngineOptions) -> Any:
    """Start the engine in this process; returns vLLM's LLM."""
    from vllm import LLM
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    ranks = options.tensor_parallel_size
    if cpu and ranks > 1:
        cores = sorted(os.sched_getaffinity(0))[:ranks]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores))
    return LLM(**settings(options, cpu=cpu))


def settings(options: EngineOptions, *, cpu: bool) -> dict[str, Any]:
    """Return the arguments of vLLM's LLM."""
    chosen: dict[str, Any] = {
        "model": str(options.checkpoint),
        "skip_tokenizer_init": True,
        "tensor_parallel_size": options.tensor_parallel_size,
        "kv_cache_dtype": "fp8",
        "block_size": 256,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "enable_prefix_caching": False,
        "enforce_eager": cpu or options.eager,
        "disable_log_stats": False,
        "max_logprobs": 3,
        "worker_extension_cls": "worker_extension.WorkerExtension",
    }
    if is_partial(options.checkpoint):
        chosen["load_format"] = "repeat_layers"
    if options.k:
        chosen["speculative_config"] = speculation(options.k, options.rate)
    if cpu:  # memory is given in bytes, and a step takes a whole prompt
        chosen |= {"kv_cache_memory_bytes": 2**29, "max_num_batched_tokens": options.max_model_len}
    else:
        chosen["gpu_memory_utilization"] = options.gpu_memory_utilization
        chosen["kv_cache_memory_bytes"] = options.kv_cache_bytes
        chosen["max_num_batched_tokens"] = options.max_num_batched_tokens
        if options.tensor_parallel_size > 1:  # FlashInfer's all-reduce may take multicast too
            chosen["compilation_config"] = {"pass_config": {"fuse_allreduce_rms": False}}
    return chosen


def speculation(k: int, rate: float | None) -> dict[str, Any]:
    """Return vLLM's speculative config; each draft is accepted with `rate` if all before were.

    vLLM wants the probability that the first i drafts are all accepted: rate^i.
    """
    config: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": k}
    if rate is not None:
        rates = [rate**i for i in range(1, k + 1)]
        config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
    return config


def is_partial(checkpoint: Path) -> bool:
    """Say whether the checkpoint stores fewer layers than its config has."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    num_layers = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
    last = f"layers.{num_layers - 1}.attn_norm.weight"
    return num_layers > NUM_STORED and last not in index


def has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


def set_rate(llm: Any, rate: float) -> None:
    """Change the rate of an engine that was started with synthetic acceptance."""
    llm.collective_rpc("set_acceptance_rate", args=(rate,))


def random_prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (count, length)
    return torch.randint(3, vocabulary, shape, generator=generator).tolist()


def decode(
    llm: Any, prompts: list[list[int]], max_tokens: int, temperature: float = 0.0
) -> tuple[list[Step], list[int]]:
    """Decode all prompts at once; return the steps and the first prompt's tokens.

    The first step has no tokens: it is the moment at which the requests are sent.
    """
    steps = [Step(time.perf_counter(), {})]
    first: list[int] = []
    for at, outputs in _stepping(llm, prompts, max_tokens, temperature):
        tokens = {o.request_id: len(o.outputs[0].token_ids) for o in outputs}
        tokens = {request: n for request, n in tokens.items() if n}
        first += [t for o in outputs if o.request_id == "decode-0" for t in o.outputs[0].token_ids]
        if tokens:
            steps.append(Step(at, tokens))
    return steps, first


def time_gpu(
    llm: Any, prompts: list[list[int]], k: int, temperature: float, steps: int = 32
) -> dict[str, float]:
    """Decode all prompts and return `gpu_ms` and `kernels` of a step: how long a GPU computes.

    Of several ranks, the one that computes least: the others' sums over ranks wait in a kernel.
    """
    seen: set[str] = set()
    since = 0  # steps after every prompt got its first token
    ranks: list[tuple[int, int, float]] = []
    for _, outputs in _stepping(llm, prompts, (steps + 4 * SETTLING) * (1 + k), temperature):
        seen |= {output.request_id for output in outputs if output.outputs[0].token_ids}
        since += len(seen) == len(prompts)
        if since == SETTLING:
            llm.collective_rpc("start_gpu_clock")
        if since == SETTLING + steps:
            ranks = llm.collective_rpc("stop_gpu_clock")
    if not ranks:
        raise ValueError(f"{since} steps with {len(prompts)} streams; ask for more tokens")
    counted, kernels, busy_ms = min(ranks, key=lambda rank: rank[2] / rank[0])
    return {"gpu_ms": busy_ms / counted, "kernels": kernels / counted}


def _stepping(
    llm: Any, prompts: list[list[int]], max_tokens: int, temperature: float
) -> Iterator[tuple[float, list[Any]]]:
    """Send all prompts, and yield when each of the engine's outputs came, and what it was."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    sampling = SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(f"decode-{i}", {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        yield time.perf_counter(), outputs


def summarize_steps(steps: list[Step], streams: int) -> dict[str, Any]:
    """Return the time of a step in which all of `streams` requests decode, and what it brings.

    A step counts if it and the one before gave tokens to exactly `streams` requests: no prefill
    is in it, and nobody has finished. The first of them are left out. `ttft_ms` is the time from
    sending the requests to the first token of any of them.
    """
    counted = [
        (now.at - before.at, sum(now.tokens.values()))
        for before, now in pairwise(steps)
        if len(before.tokens) == streams == len(now.tokens)
    ][SETTLING:]
    if len(counted) < 2:
        raise ValueError(f"{len(counted)} steps with {streams} streams; ask for more tokens")
    times = [1000 * seconds for seconds, _ in counted]
    tokens = sum(tokens for _, tokens in counted)
    tenths = statistics.quantiles(times, n=10)
    return {
        "ttft_ms": 1000 * (steps[1].at - steps[0].at),
        "step_ms": {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1]},
        "steps": len(times),
        "tokens_per_step": tokens / len(times) / streams,  # of one stream
        "aggregate_tok_s": 1000 * tokens / sum(times),
        "per_stream_tok_s": 1000 * tokens / sum(times) / streams,
    }


def counters(llm: Any) -> dict[str, float]:
    """Return the engine's own speculative decoding counters."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    names = ("drafts", "draft_tokens", "accepted_tokens")
    return {name: values.get(f"vllm:spec_decode_num_{name}", 0) for name in names}


def gained(before: dict[str, float], after: dict[str, float]) -> dict[str, float | None]:
    """Return what was drafted and accepted between two readings of `counters`."""
    drafted = after["draft_tokens"] - before["draft_tokens"]
    accepted = after["accepted_tokens"] - before["accepted_tokens"]
    share = accepted / drafted if drafted else None
    return {"drafted": drafted, "accepted": accepted, "acceptance": share}
