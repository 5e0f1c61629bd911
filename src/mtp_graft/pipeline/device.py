"""Which device the stages compute on, and what results call it."""

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from mtp_graft.errors import GraftError
from mtp_graft.recipe import Device

_EACH_GPU = """
import torch.cuda as cuda
for gpu in range(cuda.device_count()):
    print(cuda.{what})
"""


def torch_device(wanted: Device) -> Device:
    """Return the recipe's device, `auto` being the GPU if there is one."""
    if wanted != "auto":
        return wanted
    return "cuda" if gpu_names() else "cpu"


def device_name() -> str:
    """Return the GPUs' or the processor's model and how many, for manifests and the report."""
    gpus = gpu_names()
    return f"{len(gpus)}x {gpus[0]}" if gpus else f"{_processor()}, {os.cpu_count()} cores"


@cache
def gpu_names() -> tuple[str, ...]:
    """Return what torch calls the GPUs that it sees; none for its CPU build.

    Raises GraftError if torch cannot say.
    """
    return tuple(_ask_of_each_gpu("get_device_name(gpu)"))


def free_gpu_memory() -> list[int]:
    """Return the bytes that are free on each GPU; raises GraftError if torch cannot say."""
    return [int(free) for free in _ask_of_each_gpu("mem_get_info(gpu)[0]")]


def _ask_of_each_gpu(what: str) -> list[str]:
    """Let another process ask: a CUDA context in ours would take memory from what we start."""
    if torch.version.cuda is None:
        return []
    command = [sys.executable, "-c", _EACH_GPU.format(what=what)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise GraftError(f"torch cannot use the GPUs ({said[-1]}); is the driver there?")
    return done.stdout.splitlines()


def _processor() -> str:
    """Return the processor's model; on Linux `platform` knows its architecture only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
