"""Speed with several requests at a time, by `vllm bench serve`, for each number of drafts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryFile
from typing import Any
from urllib.parse import urlsplit

from mtp_graft.bench.decode import Report, tokenize
from mtp_graft.bench.requests import Session
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import Prompt, ServerClient
from mtp_graft.serving.command import find_vllm
from mtp_graft.serving.metrics import SpecDecodeCounters, drafting_result

#: Starts a server that drafts this many tokens, or finds one that runs.
ServeK = Callable[[int], AbstractContextManager[ServerClient]]
#: Holds one load, JSON as `vllm_plugin.bench_serve` reads it; returns vLLM's result.
RunLoad = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class SweepConfig:
    """Which loads, and how many requests each has."""

    concurrencies: tuple[int, ...]
    ks: tuple[int, ...]
    max_tokens: int = 128
    num_requests: int = 4  # of a point, for each that runs at a time
    ignore_eos: bool = True  # every request decodes equally long, so that the load is even
    temperature: float = 0.0


def measure_sweep(
    serve: ServeK,
    prompts: Sequence[Prompt],
    config: SweepConfig,
    report: Report,
    session: Session,
    api_key: str | None = None,
) -> dict[str, Any]:
    """Hold every load on a server for each k; points that the session has are not measured again.

    Returns `points`, all that the session has then. Raises GraftError if vLLM is not installed, and
    if every request of a point failed.
    """
    for k in config.ks:
        missing = [n for n in config.concurrencies if _point_name(k, n) not in session.units]
        if not missing:
            continue
        with serve(k) as client, vllm_bench(client.base_url, api_key) as run_load:
            token_prompts = list(tokenize(client, prompts, Session(session.attempts)).values())
            for done, concurrency in enumerate(missing):
                report(f"sweep: k = {k}, concurrency {concurrency}", done, len(missing))
                arguments = _arguments(client.base_url, api_key, concurrency, config)
                load = {"prompts": token_prompts, "max_tokens": config.max_tokens}
                found = run_load(load | {"arguments": arguments})
                session.keep(_point_name(k, concurrency), _point(found, k, concurrency))
    points = [unit for name, unit in session.units.items() if name.startswith("k=")]
    return {"points": sorted(points, key=lambda point: (point["k"], point["concurrency"]))}


def _point_name(k: int, concurrency: int) -> str:
    return f"k={k}/concurrency={concurrency}"


def _arguments(
    base_url: str, api_key: str | None, concurrency: int, config: SweepConfig
) -> list[str]:
    """Return the options of `vllm bench serve` for one point."""
    words = [
        *("--backend", "openai", "--base-url", base_url, "--dataset-name", "custom"),
        *("--skip-tokenizer-init", "--save-detailed", "--disable-tqdm"),
        *("--max-concurrency", concurrency, "--num-warmups", concurrency),
        *("--num-prompts", concurrency * config.num_requests),
        *("--temperature", config.temperature),
    ]
    if config.ignore_eos:
        words.append("--ignore-eos")
    if api_key is not None:
        words += ["--header", f"Authorization=Bearer {api_key}"]
    return [str(word) for word in words]


@contextmanager
def vllm_bench(base_url: str, api_key: str | None = None) -> Iterator[RunLoad]:
    """Run vLLM's benchmark client as a process; yield what holds one load with it."""
    find_vllm()
    # A proxy of the environment has no business between us and a named server.
    environment = {**os.environ, "NO_PROXY": str(urlsplit(base_url).hostname)}
    command = (sys.executable, "-m", "mtp_graft.vllm_plugin.bench_serve")
    pipe = subprocess.PIPE
    with TemporaryFile("w+") as log:
        client = subprocess.Popen(
            command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=log
        )

        def run_load(load: Mapping[str, Any]) -> dict[str, Any]:
            assert client.stdin is not None and client.stdout is not None
            with suppress(BrokenPipeError):
                print(json.dumps(load), file=client.stdin, flush=True)
            if not (line := client.stdout.readline()):
                log.seek(0)
                reason = "\n".join(log.read().splitlines()[-5:])
                raise GraftError(f"vllm bench serve ended against {base_url}: {reason}")
            found: dict[str, Any] = json.loads(line)
            return found

        try:
            yield run_load
        finally:
            client.kill()
            client.communicate()


def _point(found: Mapping[str, Any], k: int, concurrency: int) -> dict[str, Any]:
    """Return a point's JSON; the speed of one request counts its tokens after the first."""
    failures = [error.strip().splitlines()[-1] for error in found["errors"] if error]
    keys = ("output_lens", "ttfts", "latencies", "errors")
    done = [row for row in zip(*(found[key] for key in keys), strict=True) if not row[3]]
    if not done:
        raise GraftError(
            f"concurrency {concurrency}: every request failed, the first one with: {failures[0]}"
        )
    speeds = [(n - 1) / (latency - ttft) for n, ttft, latency, _ in done if n > 1]
    counters = None
    if "spec_decode_num_drafts" in found:
        steps = found["spec_decode_num_drafts"]
        rates = found["spec_decode_per_position_acceptance_rates"]  # of all steps
        tokens = (found["spec_decode_draft_tokens"], found["spec_decode_accepted_tokens"])
        counters = SpecDecodeCounters(steps, *tokens, [round(steps * rate) for rate in rates])
    return {
        "concurrency": concurrency,
        "per_stream_tok_s": median(speeds) if speeds else None,
        "per_stream_spread": [min(speeds), max(speeds)] if speeds else None,
        "aggregate_tok_s": found["output_throughput"],
        "ttft_ms": 1e3 * median(ttft for _, ttft, *_ in done),
        "acceptance": counters and counters.acceptance,
        **drafting_result(counters),
        "k": k,
        "requests": len(done),
        "tokens": found["total_output_tokens"],
        "seconds": found["duration"],
        "errors": len(failures),
        "failures": failures,
    }
