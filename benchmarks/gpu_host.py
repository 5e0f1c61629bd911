"""Run the GPU benchmarks in order of value within a budget of time; run again, it goes on.

    python benchmarks/gpu_host.py one --work /tmp/gpu --budget-s 560 --copy-to DIR
    python benchmarks/gpu_host.py two --work /tmp/gpu --budget-s 560 --copy-to DIR
    python benchmarks/gpu_host.py lanes --work /tmp/gpu --budget-s 1500 --copy-to DIR

--work keeps results, logs, checkpoints and compiled kernels; results and logs are copied to
--copy-to after every step, and with --pack-caches the kernels as kernel-caches.tar.gz at the end,
which --caches takes on another host. --only names steps, in the order to take; --dry-run shows
them. `lanes` does the most telling steps side by side on all GPUs of a host, two or four: each lane
has GPUs, cores and a folder in --work of its own; compiled kernels they share. docs/gpu.md explains
all of it.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path

from engines import ENVIRONMENT, has_accelerator
from record import device_name

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "models" / "tiny-dsv4"
CACHES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TILELANG_CACHE_DIR": "tilelang",
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}


@dataclass(frozen=True)
class Step:
    """One command; `needs_s` is the least time left with which it is begun."""

    name: str
    command: tuple[str, ...]
    needs_s: float
    takes_deadline: bool = True
    done_when: Path | None = None  # for commands that do not look for themselves


def script(name: str, *words: object) -> tuple[str, ...]:
    return (sys.executable, str(HERE / f"{name}.py"), *map(str, words))


def splice(out: Path) -> tuple[str, ...]:
    code = (
        "import sys; from pathlib import Path; from mtp_graft.stages.splice import splice; "
        "splice(*map(Path, sys.argv[1:]), 'mxfp4')"
    )
    return (sys.executable, "-c", code, str(TINY / "base"), str(TINY / "upstream"), str(out))


def one_gpu(work: Path, flash: Path, layers: list[int], gpu: str) -> list[Step]:
    """What one GPU can show, the most telling first; `gpu` ends the names of the results."""
    results, tiny = work / "results", work / "tiny-mxfp4"
    reference = HERE / "results" / "serve_check_cpu.json"
    check = ("--out", results / f"serve_check_{gpu}.json", "--reference", reference)
    serve = ("--checkpoint", tiny, "--max-model-len", 4096, "--limit", 6)
    decode = ("bench", "decode", *serve, "--against", TINY / "base", "--pairs", 2, "--rounds", 2)
    sweep = ("bench", "sweep", *serve, "--k", "0,1", "--streams", "1,2,3,4,8", "--requests", 3)

    def times(name: str, *words: object) -> Step:
        out = ("--out", results / f"step_time_{gpu}.json")
        where = ("--folder", flash, *out, "--layers", *layers)
        return Step(name, script("step_time", *where, *words), 90)

    def graphs(name: str, *words: object) -> Step:
        out = results / f"{name}_{gpu}.json"
        return Step(name, script("graph_modes", "--out", out, *words), 90)

    def speed(name: str, words: tuple[object, ...], needs_s: float, *vllms: object) -> Step:
        file = f"{name}_{gpu}"
        run = ("--run", work / "runs" / file)
        command = script("speed", file, "--results", results, "--", *words, *run, *vllms)
        return Step(
            name, command, needs_s, takes_deadline=False, done_when=results / f"{file}.json"
        )

    return [
        graphs("graph_modes", "--modes", "FULL_AND_PIECEWISE", "eager"),
        Step("write", script("flash_width", flash, "--layers", *layers), 120, takes_deadline=False),
        times("step_time", "--k", 1, "--variants", "int4"),
        Step("serve_check", script("gpu_serve_check", *check), 90),
        Step("splice_tiny", splice(tiny), 10, takes_deadline=False, done_when=tiny),
        times("step_time_mxfp4", "--k", 1, "--variants", "mxfp4"),
        speed("decode", decode, 300),
        speed("sweep", sweep, 200),
        speed("sweep_sizes", sweep, 200, "--", "--cudagraph-capture-sizes", *range(1, 17)),
        times("step_time_k2", "--k", 2),
        graphs("graph_modes_fork", "--modes", "FULL_AND_PIECEWISE", "PIECEWISE", "--start", "fork"),
        times("step_time_16k", *LONG),
    ]


#: As many streams as the profile seats.
FULL_HOUSE = ("--profiles", "524k", "--streams", 3, "--rates", 0.7)
#: The head first: that all of it loads on four ranks is what is asked.
LOADED = ("--profiles", "524k", "--variants", "int4", "base")
LONG = ("--k", 1, "--variants", "int4", "--contexts", 16000, "--streams", 1, 2, "--rates", 0.7)


def two_gpus(work: Path, flash: Path, layers: int, gpu: str) -> list[Step]:
    """Return the steps of Acti's deployment shape, and at the end four ranks.

    All 43 layers fit two H200; on two H100 take --layers 35.
    """
    write = ("--layers", layers, "--variants", "int4")

    def ranks(part: str, name: str, *words: object) -> Step:
        out = ("--folder", flash, "--out", work / "results" / f"{name}_{gpu}.json")
        return Step(part, script("two_gpus", *words, *out, "--layers", layers), 90)

    return [
        Step("write", script("flash_width", flash, *write), 120, takes_deadline=False),
        *(ranks(part, "two_ranks", part) for part in ("tiny", "speed")),
        ranks("ttft", "all_reduce", "ttft", "--profiles", "256k"),
        ranks("stock_graphs", "two_ranks", "speed", "--stock-graphs", *FULL_HOUSE),
        ranks("quantize", "two_ranks", "quantize"),
        ranks("four", "four_ranks", "speed", "--ranks", 4, *LOADED),
    ]


@dataclass(frozen=True)
class Lane:
    """Steps one after the other, begun as soon as no earlier lane has any of the GPUs."""

    gpus: tuple[int, ...]
    kind: str  # one or two
    steps: tuple[str, ...]
    leave_s: int = 0  # of the budget, to the lanes that wait for its GPUs

    @property
    def name(self) -> str:
        return "-".join(["gpu", *map(str, self.gpus)])


#: As many layers as fit.
LAYERS = {
    "one": {"h100": (5, 17), "h200": (17, 35)},
    "two": {"h100": (33,), "h200": (43,)},
}
STEP_TIMES = ("step_time", "step_time_mxfp4", "step_time_k2")
OVER_HTTP = ("splice_tiny", "decode", "serve_check", "sweep", "sweep_sizes")
#: By the number of GPUs.
LANES = {
    2: (
        Lane((0,), "one", STEP_TIMES, 700),
        Lane((1,), "one", OVER_HTTP, 700),
        Lane((0, 1), "two", ("tiny", "speed")),
    ),
    4: (
        Lane((0, 1), "two", ("speed", "tiny", "ttft", "stock_graphs"), 300),
        Lane((2,), "one", STEP_TIMES, 300),
        Lane((3,), "one", OVER_HTTP, 300),
        Lane((0, 1, 2, 3), "two", ("four",)),
    ),
}


def lane_commands(
    lanes: Sequence[Lane], cores: Sequence[int], work: Path, flash: Path, gpu: str
) -> list[list[str]]:
    """Return the command of each lane, without its budget; cores are shared out by GPUs."""
    share = len(cores) // len({number for lane in lanes for number in lane.gpus})
    commands = []
    for lane in lanes:
        first, last = min(lane.gpus), max(lane.gpus) + 1
        mine = ",".join(map(str, cores[first * share : last * share]))
        layers = LAYERS[lane.kind][gpu]
        words = (lane.kind, "--work", work / lane.name, "--flash", flash, "--layers", *layers)
        command = script("gpu_host", *words, "--only", *lane.steps)
        commands.append(["taskset", "--cpu-list", mine, *command])
    return commands


def run_lane(
    lane: Lane, command: list[str], earlier: list[Future[int]], end: float, work: Path
) -> int:
    """Wait for the lanes that have its GPUs, and return the exit status of its command."""
    wait_for(earlier)
    gpus = ",".join(map(str, lane.gpus))
    environment = prepare(work, None) | {"CUDA_VISIBLE_DEVICES": gpus}
    budget = ("--budget-s", str(int(end - time.monotonic() - lane.leave_s)))
    return subprocess.run([*command, *budget], env=environment, check=False).returncode


def run_lanes(options: argparse.Namespace, flash: Path, gpu: str) -> None:
    """Write all weights, then run the lanes, each on its own GPUs and cores."""
    import torch

    lanes = LANES.get(torch.cuda.device_count())
    if lanes is None or gpu not in LAYERS["one"]:
        raise SystemExit("lanes are for two or four GPUs, H100 or H200")
    end = time.monotonic() + options.budget_s
    layers = sorted({number for lane in lanes for number in LAYERS[lane.kind][gpu]})
    write = script("flash_width", flash, "--layers", *layers)
    cores = sorted(os.sched_getaffinity(0))
    commands = lane_commands(lanes, cores, options.work, flash, gpu)
    print("\n".join(map(shlex.join, [write, *commands])), flush=True)
    if options.dry_run:
        return
    subprocess.run(write, check=True, env=prepare(options.work, options.caches))
    begun: list[Future[int]] = []
    with ThreadPoolExecutor(len(lanes)) as pool:
        for lane, command in zip(lanes, commands, strict=True):
            if options.copy_to is not None:
                command += ["--copy-to", str(options.copy_to / lane.name)]
            shared = [set(other.gpus) & set(lane.gpus) for other in lanes[: len(begun)]]
            earlier = [future for future, gpus in zip(begun, shared, strict=True) if gpus]
            begun.append(pool.submit(run_lane, lane, command, earlier, end, options.work))
    pack_caches(options)
    sys.exit(max(future.result() for future in begun))


def run(step: Step, left: float, environment: dict[str, str]) -> bool:
    """Run a step within `left` seconds; say whether it ended well. Its own output is passed on."""
    command = [*step.command]
    if step.takes_deadline:  # time to stop an engine and to write the last line
        command += ["--deadline-s", str(int(left - 15))]
    print(f"== {step.name}: {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command, env=environment)
    try:
        return process.wait(timeout=left) == 0
    except subprocess.TimeoutExpired:
        process.terminate()  # our scripts take their engines with them
        try:
            process.wait(25)  # a server has 15 s to stop
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False


def gpu_name() -> str:
    """Return the GPU's name for a file: h100, h200; without one, gpu."""
    return device_name().split()[1].lower() if has_accelerator() else "gpu"


def prepare(work: Path, caches: Path | None) -> dict[str, str]:
    """Make the folders, unpack kernels of an earlier host, and return the environment."""
    for name in ("results", "caches"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if caches is not None and not any((work / "caches").iterdir()):
        with tarfile.open(caches) as archive:
            archive.extractall(work / "caches", filter="data")
    python_path = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    kernels = {name: str(work / "caches" / folder) for name, folder in CACHES.items()}
    kernels = {name: os.environ.get(name, value) for name, value in kernels.items()}
    path = {"PYTHONPATH": os.pathsep.join(filter(None, python_path))}
    return {**ENVIRONMENT, **os.environ, **kernels, **path}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gpus", choices=["one", "two", "lanes"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--flash", type=Path, help="folder of the weights; in --work if not given")
    parser.add_argument("--budget-s", type=float, default=560)
    parser.add_argument("--copy-to", type=Path)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--layers", type=int, nargs="+", help="5 17; of `two`: one number, 43")
    parser.add_argument("--caches", type=Path, help="kernel-caches.tar.gz of an earlier host")
    parser.add_argument("--pack-caches", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    gpu, flash = gpu_name(), options.flash or options.work / "flash"
    if options.gpus == "lanes":
        run_lanes(options, flash, gpu)
        return
    if options.gpus == "one":
        steps = one_gpu(options.work, flash, options.layers or [5, 17], gpu)
    else:
        steps = two_gpus(options.work, flash, (options.layers or [43])[0], gpu)
    if options.only:
        named = {step.name: step for step in steps}
        if unknown := set(options.only) - set(named):
            parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(named)}")
        steps = [named[name] for name in options.only]
    if options.dry_run:
        print("\n".join(f"{s.name}: {shlex.join(s.command)}" for s in steps))
        return
    end = time.monotonic() + options.budget_s
    environment = prepare(options.work, options.caches)
    outcome: dict[str, str] = {}
    failed = False
    for step in steps:
        left, began = end - time.monotonic(), time.monotonic()
        if step.done_when is not None and step.done_when.exists():
            outcome[step.name] = "done before"
        elif left < step.needs_s:
            outcome[step.name] = f"not begun: {left:.0f} s left, {step.needs_s:.0f} needed"
        else:
            ended_well = run(step, left, environment)
            how = "ended" if ended_well else "FAILED or cut off"
            failed |= not ended_well
            outcome[step.name] = f"{how} after {time.monotonic() - began:.0f} s"
            if options.copy_to is not None:  # now: the host may be gone before the last step
                copy = options.copy_to / "results"
                shutil.copytree(options.work / "results", copy, dirs_exist_ok=True)
    print("\n".join(f"{name}: {what}" for name, what in outcome.items()), flush=True)
    pack_caches(options)
    sys.exit(failed)


def pack_caches(options: argparse.Namespace) -> None:
    if options.copy_to is not None and options.pack_caches:
        with tarfile.open(options.copy_to / "kernel-caches.tar.gz", "w:gz") as archive:
            archive.add(options.work / "caches", ".")


if __name__ == "__main__":
    main()
