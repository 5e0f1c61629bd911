"""Is the tiny model the same here as there? Text, acceptance, chunked prefill, capture.

    python benchmarks/gpu_serve_check.py --out CPU.json
    python benchmarks/gpu_serve_check.py --out GPU.json --reference CPU.json
    python benchmarks/gpu_serve_check.py --out TWO.json --reference GPU.json --k 0 1 2 3 \\
        --tensor-parallel-size 2

One engine on the bundled tiny model without its head and one for each k with it (kept MXFP4),
greedy, one request at a time. On a GPU they are compiled, with CUDA graphs and chunked prefill in
steps of 512 tokens; the last prompt has 1,500 tokens. Compared with the reference: the best token
at each position of the reference's own text (teacher-forced, `read` where both engines read it),
the first differing position of free-running text, the share of accepted drafts, and what capture
recorded: 16 random projections of each residual row, whose relative error estimates that of the
rows themselves. What `--out` has is not measured again; several of these programs may share it.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from engines import EngineOptions, counters, started
from record import MODEL, add_measurements, arguments, measurements
from safetensors.torch import load_file
from texts import bundled_prompts, compare_forced, divergences, forced, greedy

from mtp_graft.checkpoint.capture import INTACT_NAME, RECORD_VARIABLE, RECORDINGS
from mtp_graft.serving.metrics import drafting_result
from mtp_graft.stages import capture
from mtp_graft.stages.parallel import run_in_process
from mtp_graft.stages.splice import splice

PROJECTIONS, CHUNK, LONG = 16, 512, 1500
MEASURED = ("acceptance", "acceptance_by_position", "acceptance_by_position_interval", "steps")
NOTE = (
    "Greedy, one request at a time, 12 bundled prompts and one of 1,500 tokens. Speed is not "
    "measured here. The CPU's steps take a whole prompt."
)
Entry = dict[str, Any]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--reference", type=Path, help="result of this script on a CPU")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--k", type=int, nargs="+", default=[0, 1], help="0: without the head")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        spliced = Path(scratch) / "spliced"
        splice(MODEL / "base", MODEL / "upstream", spliced, "mxfp4")
        for k in options.k:
            new: list[Entry] = []
            if f"texts-k{k}" not in by_part(options.out):
                checkpoint = spliced if k else MODEL / "base"
                folder = Path(scratch) / f"capture-k{k}"
                new = run_in_process(observe, k, checkpoint, options, folder, report=print)
            comparing = partial(summarize, expected=by_part(options.reference))
            add_measurements(options.out, "serve_check", new, comparing, NOTE)


def by_part(path: Path | None) -> dict[str, Entry]:
    return {entry["part"]: entry for entry in measurements(path)} if path else {}


def observe(
    k: int, checkpoint: Path, options: argparse.Namespace, folder: Path, _report: Any
) -> list[Entry]:
    """Start the engine and return what is compared; runs in a process of its own."""
    began = time.perf_counter()
    same = {n: getattr(options, n) for n in ("gpu_memory_utilization", "tensor_parallel_size")}
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": CHUNK, "kv_cache_bytes": 2**31}
    engine = EngineOptions(checkpoint, k, **limits, **same)
    prompts = bundled_prompts(MODEL, options.prompts, LONG)
    (folder / RECORDINGS).mkdir(parents=True)
    os.environ[RECORD_VARIABLE] = str(folder)
    with started(engine) as llm:
        start_s = time.perf_counter() - began
        texts = greedy(llm, prompts, options.max_tokens)
        counted = counters(llm)
        entry = {"part": f"texts-k{k}", "texts": texts, "start_s": start_s}
        found = [entry | {"acceptance": counted.acceptance, **drafting_result(counted)}]
        if k == 0:
            found.append({"part": "own", "read": forced(llm, prompts, texts)})
            if options.reference:
                read = forced(llm, prompts, by_part(options.reference)["texts-k0"]["texts"])
                found.append({"part": "forced", "best": [text["tokens"] for text in read]})
            recorded = record(llm, [p for p in prompts if len(p) <= CHUNK], folder)
            found.append({"part": "recording", "prompts": recorded})
    return found


def record(llm: Any, prompts: list[list[int]], folder: Path) -> list[Entry]:
    """Have the engine record each prompt; return targets and projected residuals."""
    with capture._recording(folder):
        greedy(llm, prompts, 1)
        deadline = time.monotonic() + 30
        while len(files := sorted((folder / RECORDINGS).glob("*.safetensors"))) < len(prompts):
            if time.monotonic() > deadline or not (folder / INTACT_NAME).exists():
                raise TimeoutError(f"{len(files)} of {len(prompts)} prompts recorded; see the log")
            time.sleep(0.2)
    return [_projected(load_file(file)) for file in files]


def _projected(recording: dict[str, Any]) -> Entry:
    residual = recording["residual"].float().numpy()  # [R, S*D]
    shape = (residual.shape[1], PROJECTIONS)
    directions = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    values = residual @ directions / np.sqrt(PROJECTIONS)  # [R, 16], keeps squared norms
    rows = [[float(f"{value:.4g}") for value in row] for row in values.tolist()]
    return {"targets": recording["targets"].tolist(), "projected": rows}


def summarize(measured: list[Entry], expected: dict[str, Entry]) -> dict[str, Any]:
    """Return the comparisons that what was measured so far allows."""
    found = {entry["part"]: entry for entry in measured}
    base = found.get("texts-k0")
    result: dict[str, Any] = {}
    for part, head in found.items():
        if not head.get("k"):
            continue
        entry = result[f"k{head['k']}"] = {name: head[name] for name in MEASURED}
        if base:
            entry["divergences_from_base"] = divergences(base["texts"], head["texts"])
        if part in expected:
            points = 100 * (head["acceptance"] - expected[part]["acceptance"])
            entry["acceptance_difference_points"] = points
    if base:  # an engine does not choose all of its tokens again when it reads them
        read_again = [text["tokens"] for text in found["own"]["read"]]
        result["teacher_forced_alone"] = compare_forced(base["texts"], read_again)
    if base and "texts-k0" in expected:
        texts, best = expected["texts-k0"]["texts"], found["forced"]["best"]
        result["teacher_forced"] = compare_forced(texts, best)
        result["divergences_from_reference"] = divergences(texts, base["texts"])
        pair = (expected["recording"]["prompts"], found["recording"]["prompts"])
        result["recording"] = compare_recordings(*pair)
        if "own" in expected:  # both engines read the same text
            result["teacher_forced_read"] = compare_forced(expected["own"]["read"], best)
    return {"results": result}


def compare_recordings(expected: list[Entry], actual: list[Entry]) -> dict[str, Any]:
    """Return the residuals' relative error over all rows, and how many targets are equal."""
    wanted, found = (
        {key: np.concatenate([each[key] for each in recorded]) for key in ("projected", "targets")}
        for recorded in (expected, actual)
    )
    error = np.linalg.norm(found["projected"] - wanted["projected"])
    return {
        "rows": len(wanted["projected"]),
        "rel_error": float(error / np.linalg.norm(wanted["projected"])),
        "targets_equal": int((wanted["targets"] == found["targets"]).sum()),
    }


if __name__ == "__main__":
    main()
