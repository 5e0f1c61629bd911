"""Is the tiny model on a GPU the same as on the CPU? Text, acceptance, chunked prefill, capture.

    python benchmarks/gpu_serve_check.py --out benchmarks/results/serve_check_cpu.json
    python benchmarks/gpu_serve_check.py --out GPU.json --reference CPU.json

Two engines on the bundled tiny model, without and with its head (kept MXFP4), greedy, one request
at a time. On a GPU they are compiled, with CUDA graphs and chunked prefill in steps of 512 tokens;
the last prompt has 1,500 tokens. Compared with the reference: the best token at each position of
the CPU's own text (teacher-forced), the first differing position of free-running text, the share of
accepted drafts, and what capture recorded: 16 random projections of each residual row, whose
relative error estimates that of the rows themselves.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from engines import EngineOptions, counters, started
from record import MODEL, arguments, write_result
from safetensors.torch import load_file
from texts import bundled_prompts, compare_forced, divergences, forced, greedy, tokens_of

from mtp_graft.checkpoint.capture import INTACT_NAME, RECORD_VARIABLE, RECORDINGS, SWITCH_NAME
from mtp_graft.stages.process import run_in_process
from mtp_graft.stages.splice import splice

PROJECTIONS, CHUNK, LONG = 16, 512, 1500
NOTE = (
    "Greedy, one request at a time, 12 bundled prompts and one of 1,500 tokens. Speed is not "
    "measured here. The CPU's steps take a whole prompt."
)
Entry = dict[str, Any]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--reference", type=Path, help="result of this script on a CPU")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=96)
    options = parser.parse_args()
    reference = json.loads(options.reference.read_text()) if options.reference else None
    expected = {e["part"]: e for e in reference["measurements"]} if reference else {}
    prompts = bundled_prompts(options.model, options.prompts, LONG)
    text = expected.get("texts-k0", {}).get("texts")
    found: list[Entry] = []
    with tempfile.TemporaryDirectory() as scratch:
        spliced = Path(scratch) / "spliced"
        splice(options.model / "base", options.model / "upstream", spliced, "mxfp4")
        for k, checkpoint in ((0, options.model / "base"), (1, spliced)):
            engine = EngineOptions(
                *(checkpoint, k, 4096, 4, CHUNK),
                gpu_memory_utilization=0.1,
                kv_cache_bytes=2**31,
            )
            job = (engine, prompts, options.max_tokens, text, Path(scratch) / f"capture-k{k}")
            found += run_in_process(observe, *job, report=print)
            results = summarize({e["part"]: e for e in found}, expected)
            write_result(options.out, "serve_check", results, note=NOTE, measurements=found)


def observe(
    engine: EngineOptions,
    prompts: list[list[int]],
    max_tokens: int,
    reference: list[Any] | None,
    folder: Path,
    _report: Any,
) -> list[Entry]:
    """Start the engine and return what is compared; runs in a process of its own."""
    began = time.perf_counter()
    (folder / RECORDINGS).mkdir(parents=True)
    os.environ[RECORD_VARIABLE] = str(folder)
    with started(engine) as llm:
        start_s = time.perf_counter() - began
        texts = greedy(llm, prompts, max_tokens)
        counts = counters(llm)
        drafted, accepted = counts["draft_tokens"], counts["accepted_tokens"]
        acceptance = accepted / drafted if drafted else None
        entry = {"texts": texts, "drafted": drafted, "accepted": accepted, "acceptance": acceptance}
        found = [{"part": f"texts-k{engine.k}", **entry, "start_s": start_s}]
        if engine.k == 0:
            if reference is not None:
                best = tokens_of(forced(llm, prompts, reference))
                found.append({"part": "forced", "best": best})
            recorded = record(llm, [p for p in prompts if len(p) <= CHUNK], folder)
            found.append({"part": "recording", "prompts": recorded})
    return found


def record(llm: Any, prompts: list[list[int]], folder: Path) -> list[Entry]:
    """Have the engine record each prompt; return targets and projected residuals."""
    (folder / INTACT_NAME).touch()
    (folder / SWITCH_NAME).touch()
    greedy(llm, prompts, 1)
    (folder / SWITCH_NAME).unlink()
    deadline = time.monotonic() + 30
    while len(files := sorted((folder / RECORDINGS).glob("*.safetensors"))) < len(prompts):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(files)} of {len(prompts)} prompts recorded")
        time.sleep(0.2)
    if not (folder / INTACT_NAME).exists():
        raise OSError("a recording could not be written; see the engine's log")
    return [_projected(load_file(file)) for file in files]


def _projected(recording: dict[str, Any]) -> Entry:
    residual = recording["residual"].float().numpy()  # [R, S*D]
    shape = (residual.shape[1], PROJECTIONS)
    directions = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    values = residual @ directions / np.sqrt(PROJECTIONS)  # [R, 16], keeps squared norms
    rows = [[float(f"{value:.4g}") for value in row] for row in values.tolist()]
    return {"targets": recording["targets"].tolist(), "projected": rows}


def summarize(found: dict[str, Entry], expected: dict[str, Entry]) -> dict[str, Any]:
    """Return the comparisons that what was measured so far allows."""
    result: dict[str, Any] = {}
    base, head = found.get("texts-k0"), found.get("texts-k1")
    if head:
        result["acceptance"] = head["acceptance"]
    if base and head:
        result["divergences_from_base"] = divergences(base["texts"], head["texts"])
    if head and "texts-k1" in expected:
        points = 100 * (head["acceptance"] - expected["texts-k1"]["acceptance"])
        result |= {"acceptance_difference_points": points, "within_3_points": abs(points) <= 3}
    if "texts-k0" in expected:
        texts = expected["texts-k0"]["texts"]
        if "forced" in found:
            result["teacher_forced"] = compare_forced(texts, found["forced"]["best"])
        if base:
            result["divergences_from_reference"] = divergences(texts, base["texts"])
    if "recording" in found and "recording" in expected:
        pair = (expected["recording"]["prompts"], found["recording"]["prompts"])
        result["recording"] = compare_recordings(*pair)
    return result


def compare_recordings(expected: list[Entry], actual: list[Entry]) -> dict[str, Any]:
    """Return the residuals' relative error over all rows, and how many targets are equal."""
    error = norm = 0.0
    equal = rows = 0
    for wanted, found in zip(expected, actual, strict=True):
        reference = np.array(wanted["projected"])
        error += float(np.square(np.array(found["projected"]) - reference).sum())
        norm += float(np.square(reference).sum())
        rows += len(reference)
        equal += sum(map(int.__eq__, wanted["targets"], found["targets"]))
    return {"rows": rows, "rel_error": (error / norm) ** 0.5, "targets_equal": equal}


if __name__ == "__main__":
    main()
