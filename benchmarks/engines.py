"""vLLM's offline engine for the benchmarks, driven one step at a time.

The engine's core runs in a process of its own and does not wait for us, so the time between two of
its outputs is the time of a step, scheduling and sampling included. HTTP is not in it.
"""

import json
import os
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mtp_graft.serving.metrics import SpecDecodeCounters
from mtp_graft.serving.profiles import ALWAYS, ON_GPUS, split

ENVIRONMENT = {
    "VLLM_PLUGINS": "mtp_graft",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # as `vllm serve` starts its engine
    "VLLM_DEEP_GEMM_WARMUP": "skip",  # each decode warms up its own shapes
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1200",  # of several ranks: the first step compiles
    **{"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0"},  # shared hosts may forbid
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",  # NVLink multicast
    **split(ALWAYS)[1],
    **split(ON_GPUS)[1],
}
#: The variable that names the file out of which `worker_extension.ChosenK` reads k.
CHOSEN_K = "CHOSEN_K"
#: Layers that a checkpoint of Flash's width stores: 0 and 1 sliding window, from 2 on ratio 4 and
#: 128 in turn; 0 to 2 with hash routing. So 3 and 4 are like all that come after them.
NUM_STORED = 5
_LAYER = re.compile(r"^layers\.(\d+)\.")
#: Steps at the beginning of a decode that are not counted.
SETTLING = 4


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
    drafting: dict[str, Any] = field(default_factory=dict)  # more of the speculative config
    more: dict[str, Any] = field(default_factory=dict)  # further arguments of vLLM's LLM


@dataclass(frozen=True)
class Step:
    """One output of the engine: when it came, and how many tokens each request got."""

    at: float  # seconds
    tokens: dict[str, int]


@contextmanager
def started(options: EngineOptions) -> Iterator[Any]:
    """Give vLLM's LLM of a new engine, whose processes end with the block."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    here = str(Path(__file__).resolve().parent)  # workers import worker_extension
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    from vllm import LLM
    from vllm.platforms import current_platform

    llm = LLM(**settings(options, cpu=current_platform.is_cpu()))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


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
        "enforce_eager": cpu,
        "disable_log_stats": False,
        "max_logprobs": 3,
        "kernel_config": {"enable_jit_warmup": False},  # over four minutes on a cold host
        "worker_extension_cls": "worker_extension.WorkerExtension",
    }
    if is_partial(options.checkpoint):
        chosen["load_format"] = "repeat_layers"
    if options.k:
        chosen["speculative_config"] = speculation(options.k, options.rate) | options.drafting
    if cpu:  # memory is given in bytes, and a step takes a whole prompt
        chosen |= {"kv_cache_memory_bytes": 2**29, "max_num_batched_tokens": options.max_model_len}
    else:
        chosen["gpu_memory_utilization"] = options.gpu_memory_utilization
        chosen["kv_cache_memory_bytes"] = options.kv_cache_bytes
        chosen["max_num_batched_tokens"] = options.max_num_batched_tokens
    return chosen | options.more


def speculation(k: int, rate: float | None) -> dict[str, Any]:
    """Return vLLM's speculative config; vLLM wants rate^i, that the first i are all accepted."""
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


def copies(layer: int, num_layers: int) -> range:
    """Return the layers that are not stored and get the weights of stored layer `layer`."""
    if layer < NUM_STORED - 2:
        return range(0)
    return range(layer + 2, num_layers, 2)


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to; None for embedding, head and the MTP head."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def random_prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count, length), generator=generator).tolist()


def decode(llm: Any, prompts: list[list[int]], max_tokens: int) -> Iterator[Step]:
    """Sample all prompts at once; the first step has no tokens: the requests are sent then."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=1.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    engine = llm.llm_engine
    yield Step(time.perf_counter(), {})
    for i, prompt in enumerate(prompts):
        engine.add_request(f"decode-{i}", {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        outputs, at = engine.step(), time.perf_counter()
        tokens = {o.request_id: len(o.outputs[0].token_ids) for o in outputs}
        if any(tokens.values()):
            yield Step(at, {request: n for request, n in tokens.items() if n})


def summarize_steps(steps: list[Step], requests: int) -> dict[str, Any]:
    """Return the time of a step in which all of `requests` decode, and what it brings.

    A step counts if it and the one before gave tokens to exactly `requests` requests: no prefill
    is in it, and nobody has finished. The first of them are left out.
    """
    counted = [
        (1000 * (now.at - before.at), sum(now.tokens.values()))
        for before, now in pairwise(steps)
        if len(before.tokens) == requests == len(now.tokens)
    ][SETTLING:]
    if len(counted) < 2:
        raise ValueError(f"{len(counted)} steps with {requests} requests; ask for more tokens")
    times = [ms for ms, _ in counted]
    tenths = statistics.quantiles(times, n=10)
    return {
        "step_ms": {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1]},
        "steps": len(times),
        "tokens_per_step": sum(n for _, n in counted) / len(times) / requests,  # of one request
        "ttft_ms": 1000 * (steps[1].at - steps[0].at),
    }


def counters(llm: Any) -> SpecDecodeCounters:
    """Return what the engine counted of its drafts since it started; zeros if it does not draft."""
    found = {metric.name.removeprefix("vllm:"): metric for metric in llm.get_metrics()}
    names = ("drafts", "draft_tokens", "accepted_tokens")
    counts = [getattr(found.get(f"spec_decode_num_{name}"), "value", 0) for name in names]
    positions = found.get("spec_decode_num_accepted_tokens_per_pos")
    return SpecDecodeCounters(*counts, tuple(getattr(positions, "values", ())))
