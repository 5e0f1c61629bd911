"""What do CUDA graphs do to the head? Acceptance and text of the tiny model in each mode.

    python benchmarks/graph_modes.py --out benchmarks/results/graph_modes_h100.json

One engine a mode, one after the other, k = 1, greedy, one request at a time: the prompts and
settings of `gpu_serve_check.py`. Text must be the same in every mode, and the acceptance that of
`eager`. `vllm serve` spawns its engine, an offline one is forked: --start says which. The plugin's
own remedy (`cuda/graph_breaks.py`) is at work unless --without-remedy is given; `remedied` has the
methods that it found without vLLM's decorator.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from engines import EngineOptions, Send, counters, exit_on_sigterm, gained, start
from gpu_serve_check import CHUNK, LONG, MODEL
from measurements import Entry, Limits, Measurements
from texts import bundled_prompts, greedy

from mtp_graft.stages.splice import splice

MODES = ("eager", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE", "PIECEWISE")
NOTE = (
    "Tiny model, MXFP4 head, k = 1, greedy, one request at a time, 12 bundled prompts and one of "
    f"{LONG:,} tokens, 96 tokens each. Speed is not measured here."
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--start", choices=["spawn", "fork"], default="spawn")
    parser.add_argument("--without-remedy", action="store_true", help="of a forked engine")
    Limits.add_options(parser)
    options = parser.parse_args()
    if options.without_remedy and options.start == "spawn":
        parser.error("--without-remedy: a spawned engine loads the plugin anew; add --start fork")
    return options


def main() -> None:
    options = parse_arguments()
    exit_on_sigterm()
    limits = Limits.of(options)
    done = Measurements(options.out, "graph_modes", summarize, NOTE)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "spliced"
        splice(MODEL / "base", MODEL / "upstream", checkpoint, "mxfp4")
        prompts = bundled_prompts(MODEL, options.prompts, LONG)
        for mode in options.modes:
            remedy = not options.without_remedy
            identity = {"mode": mode, "start": options.start, "remedy": remedy}
            if not done.has(**identity):
                job = "-".join(map(str, identity.values()))
                arguments = (identity, checkpoint, prompts, options.max_tokens)
                done.run(job, limits, observe, *arguments)


def observe(
    send: Send, identity: Entry, checkpoint: Path, prompts: list[list[int]], max_tokens: int
) -> None:
    """Start the engine in one mode and send what it drafted and wrote."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = identity["start"]
    if not identity["remedy"]:
        from mtp_graft.vllm_plugin.cuda import graph_breaks

        graph_breaks.BREAKS = ()  # inherited by the engine, which is forked
    mode = identity["mode"]
    how = {"eager": True} if mode == "eager" else {"graphs": mode}
    began = time.perf_counter()
    llm = start(EngineOptions(checkpoint, 1, 4096, 4, CHUNK, 0.4, **how))
    start_s = time.perf_counter() - began
    before = counters(llm)
    texts = [text["tokens"] for text in greedy(llm, prompts, max_tokens)]
    seen = {"start_s": start_s, "remedied": llm.collective_rpc("attention_remedied")[0]}
    send({**identity, **gained(before, counters(llm)), **seen, "texts": texts})


def summarize(entries: list[Entry]) -> list[dict[str, Any]]:
    """Return each mode's acceptance, and in how many texts it differs from the first one's."""
    keys = ("mode", "start", "remedy", "remedied", "drafted", "accepted", "acceptance")
    return [
        {
            **{key: entry[key] for key in keys},
            "texts_changed": sum(map(list.__ne__, entry["texts"], entries[0]["texts"])),
        }
        for entry in entries
    ]


if __name__ == "__main__":
    main()
