"""Speed with several requests at a time, by `vllm bench serve`, for each number of drafts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from mtp_graft.bench.decode import Asked, DecodeConfig, measured
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import find_vllm
from mtp_graft.serving.metrics import SpecDecodeCounters, drafting_result
from mtp_graft.serving.server import Report


def measure_sweep(
    serve: Callable[[int], AbstractContextManager[ServerClient]],
    asked: Asked,
    ks: Sequence[int],
    concurrencies: Sequence[int],
    report: Report,
    folder: Path,
    least: int = 0,
) -> dict[str, Any]:
    """Hold every load on what `serve` gives for each k, but for points that `folder` has already.

    A point has `rounds` requests for each that runs at a time, and `least` in all. Returns
    `points`, with all that `folder` has. Raises GraftError without vLLM, or if all of a point fail.
    """
    find_vllm()
    prompts, config = asked
    for k in sorted(ks):
        with ExitStack() as stack:
            connect = cache(partial(stack.enter_context, serve(k)))
            for done, concurrency in enumerate(sorted(concurrencies)):
                report(f"sweep: k = {k}, concurrency {concurrency}", done, len(concurrencies))
                of_load = replace(config, rounds=max(config.rounds, -(-least // concurrency)))
                measure = partial(_point, connect, (prompts, of_load), k, concurrency)
                measured(folder, f"k{k}-concurrency{concurrency}", measure)
    points = [json.loads(path.read_text()) for path in folder.glob("k*-concurrency*.json")]
    return {"points": sorted(points, key=lambda point: (point["k"], point["concurrency"]))}


def _point(
    connect: Callable[[], ServerClient], asked: Asked, k: int, concurrency: int
) -> dict[str, Any]:
    """Measure one point; return its JSON. The speed of one request is of tokens after the first."""
    client, (prompts, config) = connect(), asked
    load = {"prompts": [*map(client.encode, prompts)], "max_tokens": config.max_tokens}
    load["arguments"] = _arguments(client, concurrency, config)
    found = run_load(client.base_url, load)
    failures = [error.strip().split("\n")[-1] for error in found["errors"] if error]
    columns = (found[key] for key in ("errors", "output_lens", "ttfts", "latencies"))
    requests = [*zip(*columns, strict=True)]
    done = [numbers for error, *numbers in requests if not error]
    if not done:
        found_first = f"every request failed, the first one with: {failures[0]}"
        raise GraftError(f"concurrency {concurrency}: {found_first}")
    speeds = [(n - 1) / (latency - ttft) for n, ttft, latency in done if n > 1]
    counters = _counters(found)
    return {
        "concurrency": concurrency,
        "per_stream_tok_s": median(speeds) if speeds else None,
        "aggregate_tok_s": found["output_throughput"],
        "ttft_ms": 1e3 * median(ttft for _, ttft, _ in done),
        "acceptance": counters and counters.acceptance,
        **drafting_result(counters),
        "k": k,  # of a server that drafts nothing, too
        "requests": len(done),
        "tokens": found["total_output_tokens"],
        "seconds": found["duration"],
        "errors": len(failures),
        "failures": failures,
        "answers": [(0, 0.0) if error else (n, whole) for error, n, _, whole in requests],
    }


def _arguments(client: ServerClient, concurrency: int, config: DecodeConfig) -> list[str]:
    options = {
        "backend": "openai",
        "base-url": client.base_url,
        "dataset-name": "custom",
        "max-concurrency": concurrency,
        "num-warmups": concurrency,
        "num-prompts": concurrency * config.rounds,
        "temperature": config.temperature,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    words += ["--skip-tokenizer-init", "--save-detailed", "--disable-tqdm"]
    if config.ignore_eos:
        words.append("--ignore-eos")
    if client.api_key is not None:
        words += ["--header", f"Authorization=Bearer {client.api_key}"]
    return words


def run_load(base_url: str, load: Mapping[str, Any]) -> dict[str, Any]:
    """Hold a load, as `vllm_plugin.bench_serve` reads it; return vLLM's result."""
    done = subprocess.run(
        [sys.executable, "-m", "mtp_graft.vllm_plugin.bench_serve"],
        input=json.dumps(load),
        # A proxy of the environment has no business between us and a named server.
        env={**os.environ, "NO_PROXY": str(urlsplit(base_url).hostname)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = "\n".join(done.stderr.splitlines()[-5:])
        raise GraftError(f"vllm bench serve failed against {base_url}: {reason}")
    return json.loads(done.stdout)


def _counters(found: Mapping[str, Any]) -> SpecDecodeCounters | None:
    counted = ("num_drafts", "draft_tokens", "accepted_tokens", "per_position_acceptance_rates")
    if "spec_decode_num_drafts" not in found:
        return None
    steps, drafted, accepted, rates = (found[f"spec_decode_{name}"] for name in counted)
    return SpecDecodeCounters(steps, drafted, accepted, [round(steps * rate) for rate in rates])
