"""Time the whole quantize stage on an input of Flash's size, from files that are in no cache.

    python benchmarks/quantize_full.py --input FOLDER --out result.json [--rounds 2]

FOLDER is `synthetic_flash.py`'s. Triton compiles its kernels beforehand, in a process of its own
(`warm_up_s`). Before every round the files are dropped from the page cache and the disk's own
speed is measured past it: a few recordings with O_DIRECT, one after the other and eight at once,
none twice. Each round runs in a process of its own. `seconds` are the stage's, from its first line
to its report; `phases_s` says when each phase ended.

`bytes` are the kernel's counts for the stage (/proc/self/io): read from the disk and through the
page cache, and handed over to be written; `dirty_at_end` is what of that (and of all else on the
machine) was not on the disk when the stage returned. `floor_s` is what the disk alone would take
for the bytes read, at the better of the two speeds.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from record import arguments, write_result

CHUNK = 2**24
READERS = 8
MEASURED = "measured.json"  # beside the run: what its process counted


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stage-run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warm_up:
        warm_up()
        return
    if options.stage_run is not None:
        run_stage(options.input, options.stage_run)
        return
    command = [sys.executable, __file__, "--input", ".", "--out", "-", "--warm-up"]
    warm_up_s = seconds_of(command)
    rounds = []
    for _ in range(options.rounds):
        rounds.append(one_round(options.input))
        print(json.dumps(rounds[-1]), flush=True)
        found = {**summary(rounds), "warm_up_s": warm_up_s}
        write_result(options.out, "quantize_full", found)


def one_round(folder: Path) -> dict[str, Any]:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    drop_from_cache(folder)
    disk = disk_speeds(folder)
    command = [sys.executable, __file__, "--input", str(folder), "--out", "-"]
    wall = seconds_of([*command, "--stage-run", str(run)])
    report = json.loads((run / "report.json").read_text())
    measured = json.loads((folder / MEASURED).read_text())
    keys = ("variants", "seconds", "peak_gpu_bytes", "peak_host_bytes", "calibration_tokens")
    tokens = {k: v for k, v in report["tokens_per_expert"].items() if k != "counts"}
    found = {key: report[key] for key in keys}
    floor = measured["bytes"]["disk_read"] / max(disk.values())
    return {
        **{**found, **measured, "tokens_per_expert": tokens},
        **{"process_s": wall, "disk_bytes_per_s": disk, "floor_s": floor},
    }


def seconds_of(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def warm_up() -> None:
    """Let Triton compile what GPTQ needs at Flash's sizes; it keeps it on disk."""
    from mtp_graft.quant.gptq import gptq

    if torch.cuda.is_available():
        for outputs, inputs in ((4096, 4096), (4096, 2048)):
            hessian = torch.eye(inputs, device="cuda")[None]
            gptq(torch.randn(1, outputs, inputs, device="cuda"), hessian, scale="mse")
        torch.cuda.synchronize()


def run_stage(folder: Path, run: Path) -> None:
    """Run the stage once, in this process."""
    from mtp_graft.recipe import QuantizeSection
    from mtp_graft.stages.quantize import quantize

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.zeros(1, device=device)  # the context is the process's, not the stage's
    config = QuantizeSection(device=device)  # type: ignore[arg-type]
    inputs = (folder / "capture", folder / "upstream", folder / "base")
    started = time.perf_counter()
    phases: dict[str, float] = {}

    def progress(phase: str, done: int, total: int) -> None:
        if done == total:
            phases.setdefault(phase, time.perf_counter() - started)

    with counted_bytes() as moved:
        quantize(*inputs, run, config, progress)
    phases["report"] = time.perf_counter() - started
    (folder / MEASURED).write_text(json.dumps({"phases_s": phases, "bytes": moved}))


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Yield what, at the end, holds the bytes that this process moved inside."""
    names = {"read_bytes": "disk_read", "rchar": "read"}
    names |= {"write_bytes": "to_be_written", "wchar": "written"}
    before, moved = proc_counts("self/io"), dict.fromkeys([*names.values(), "dirty_at_end"], 0)
    yield moved
    after = proc_counts("self/io")
    moved |= {ours: after[kernels] - before[kernels] for kernels, ours in names.items()}
    memory = proc_counts("meminfo")
    moved["dirty_at_end"] = 1024 * (memory["Dirty"] + memory["Writeback"])


def proc_counts(name: str) -> dict[str, int]:
    lines = Path("/proc", name).read_text().splitlines()
    return {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def disk_speeds(folder: Path) -> dict[str, float]:
    """Return bytes a second read past the page cache, by one reader and by `READERS` at once."""
    recordings = sorted((folder / "capture" / "recordings").iterdir())
    few = min(READERS, len(recordings) // 2)
    alone, together = recordings[:few], recordings[few : few + READERS]
    return {"1": direct_read_speed(alone, 1), str(READERS): direct_read_speed(together, READERS)}


def direct_read_speed(files: list[Path], readers: int) -> float:
    """Return bytes a second of reading `files` past the page cache, `readers` of them at once."""
    started = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        total = sum(pool.map(read_directly, files))
    return total / (time.perf_counter() - started)


def read_directly(file: Path) -> int:
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, CHUNK)  # aligned, as O_DIRECT wants it
    total = 0
    while got := os.preadv(descriptor, [buffer], total):
        total += got
        if got % 4096:  # the end of the file
            break
    os.close(descriptor)
    return total


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the rounds, and every round."""
    parts, speeds = rounds[0]["seconds"], rounds[0]["disk_bytes_per_s"]
    return {
        "tokens": rounds[0]["calibration_tokens"],
        "seconds": {p: statistics.median(r["seconds"][p] for r in rounds) for p in parts},
        "peak_gpu_bytes": max(r["peak_gpu_bytes"] for r in rounds),
        "peak_host_bytes": max(r["peak_host_bytes"] for r in rounds),
        "disk_bytes_per_s": {
            n: statistics.median(r["disk_bytes_per_s"][n] for r in rounds) for n in speeds
        },
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()
