"""Time the whole quantize stage on an input of Flash's size, from files that are in no cache.

    python benchmarks/quantize_full.py --input FOLDER --out result.json [--rounds 2]

FOLDER is `synthetic_flash.py`'s. Triton compiles its kernels beforehand, in a process of its own
(`warm_up_s`). Before every round the files are dropped from the page cache. Each round runs in a
process of its own. `seconds` are the stage's, from its first line to its report.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from record import arguments, write_result

from mtp_graft.quant.gptq import gptq
from mtp_graft.recipe import QuantizeSection
from mtp_graft.stages.parallel import run_in_process
from mtp_graft.stages.quantize import quantize


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    began = time.perf_counter()
    run_in_process(warm_up, report=print)
    warm_up_s = time.perf_counter() - began
    rounds = []
    for _ in range(options.rounds):
        rounds.append(one_round(options.input))
        print(json.dumps(rounds[-1]), flush=True)
        found = {p: max(r[p] for r in rounds) for p in ("peak_gpu_bytes", "peak_host_bytes")}
        found |= {"tokens": rounds[0]["calibration_tokens"], "rounds": rounds}
        write_result(options.out, "quantize_full", found | {"warm_up_s": warm_up_s})


def one_round(folder: Path) -> dict[str, Any]:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    drop_from_cache(folder)
    began = time.perf_counter()
    run_in_process(run_stage, folder, run, report=print)
    process_s, report = time.perf_counter() - began, json.loads((run / "report.json").read_text())
    keys = ("variants", "seconds", "peak_gpu_bytes", "peak_host_bytes", "calibration_tokens")
    return {key: report[key] for key in keys} | {"process_s": process_s}


def warm_up(_report: Any) -> None:
    """Let Triton compile what GPTQ needs at Flash's sizes; it keeps it on disk."""
    if torch.cuda.is_available():
        for outputs, inputs in ((4096, 4096), (4096, 2048)):
            hessian = torch.eye(inputs, device="cuda")[None]
            gptq(torch.randn(1, outputs, inputs, device="cuda"), hessian, scale="mse")
        torch.cuda.synchronize()


def run_stage(folder: Path, run: Path, _report: Any) -> None:
    """Run the stage once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.zeros(1, device=device)  # the context is the process's, not the stage's
    config = QuantizeSection(device=device)  # type: ignore[arg-type]
    inputs = (folder / "capture", folder / "upstream", folder / "base")
    quantize(*inputs, run, config, lambda *_: None)


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    main()
