"""Time the whole quantize stage on an input of Flash's size, from files that are in no cache.

    python benchmarks/quantize_full.py --input FOLDER --out result.json [--rounds 2] [--replay true]

FOLDER is `synthetic_flash.py`'s. Before every round the files are dropped from the page cache and
the disk's own speed is measured: one recording, read with O_DIRECT. Each round runs in a process
of its own; `seconds` are the stage's, starting with its first line.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import write_result

CHUNK = 2**24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replay", nargs="+", default=["true"])
    parser.add_argument("--stage-run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage_run is not None:
        run_stage(options.input, options.stage_run, options.replay[0])
        return
    rounds = []
    for replay in options.replay:
        for _ in range(options.rounds):
            rounds.append({"replay": replay, **one_round(options.input, replay)})
            print(json.dumps(rounds[-1]), flush=True)
            write_result(options.out, "quantize_full", summary(rounds))


def one_round(folder: Path, replay: str) -> dict[str, Any]:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    drop_from_cache(folder)
    recording = min((folder / "capture" / "recordings").iterdir())
    disk = direct_read_speed(recording)
    command = [sys.executable, __file__, "--input", str(folder), "--out", "-"]
    started = time.perf_counter()
    subprocess.run([*command, "--stage-run", str(run), "--replay", replay], check=True)
    wall = time.perf_counter() - started
    report = json.loads((run / "report.json").read_text())
    keys = ("variants", "seconds", "peak_gpu_bytes", "peak_host_bytes", "calibration_tokens")
    tokens = {k: v for k, v in report["tokens_per_expert"].items() if k != "counts"}
    found = {key: report[key] for key in keys}
    return {**found, "tokens_per_expert": tokens, "process_s": wall, "disk_bytes_per_s": disk}


def run_stage(folder: Path, run: Path, replay: str) -> None:
    """Run the stage once, in this process."""
    from mtp_graft.stages.quantize import QuantizeConfig, quantize

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.zeros(1, device=device)  # the context is the process's, not the stage's
    config = QuantizeConfig(device=device, replay=replay)  # type: ignore[arg-type]
    inputs = (folder / "capture", folder / "upstream", folder / "base")
    quantize(*inputs, run, config, lambda *_: None)


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def direct_read_speed(file: Path) -> float:
    """Return bytes a second of reading `file` past the page cache."""
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, CHUNK)  # aligned, as O_DIRECT wants it
    started, total = time.perf_counter(), 0
    while got := os.preadv(descriptor, [buffer], total):
        total += got
        if got % 4096:  # the end of the file
            break
    os.close(descriptor)
    return total / (time.perf_counter() - started)


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the rounds with true attention, and every round."""
    main_rounds = [r for r in rounds if r["replay"] == rounds[0]["replay"]]
    parts = main_rounds[0]["seconds"]
    return {
        "tokens": main_rounds[0]["calibration_tokens"],
        "seconds": {p: statistics.median(r["seconds"][p] for r in main_rounds) for p in parts},
        "peak_gpu_bytes": max(r["peak_gpu_bytes"] for r in main_rounds),
        "peak_host_bytes": max(r["peak_host_bytes"] for r in main_rounds),
        "disk_bytes_per_s": statistics.median(r["disk_bytes_per_s"] for r in main_rounds),
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()
