"""Which device the stages compute on, and what results call it."""

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from mtp_graft.errors import GraftError
from mtp_graft.recipe import Device

_TELL_OF_GPUS = """
import torch.cuda as cuda
for gpu in range(cuda.device_count()):
    print(cuda.get_device_name(gpu), *cuda.mem_get_info(gpu), sep="\\t")
"""


class Gpu(NamedTuple):
    """A GPU as torch sees it: bytes of memory, and how many are free."""

    name: str
    free: int
    total: int


def find_gpus() -> list[Gpu]:
    """Return the GPUs that torch sees, none for its CPU build; GraftError if it cannot say.

    Another process asks: a CUDA context in ours would take memory from what we start.
    """
    if torch.version.cuda is None:
        return []
    command = [sys.executable, "-c", _TELL_OF_GPUS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise GraftError(f"torch cannot use the GPUs ({said[-1]}); is the driver there?")
    rows = (line.split("\t") for line in done.stdout.splitlines())
    return [Gpu(name, int(free), int(total)) for name, free, total in rows]


@cache
def gpu_names() -> tuple[str, ...]:
    """Return what torch calls the GPUs; raises GraftError as `find_gpus` does."""
    return tuple(gpu.name for gpu in find_gpus())


def torch_device(wanted: Device) -> Device:
    """Return the recipe's device, `auto` being the GPU if there is one."""
    return wanted if wanted != "auto" else "cuda" if gpu_names() else "cpu"


def device_name() -> str:
    """Return the GPUs' or the processor's model and how many, for manifests and the report."""
    if gpus := gpu_names():
        return f"{len(gpus)}x {gpus[0]}"
    cpuinfo = Path("/proc/cpuinfo")  # on Linux `platform` knows the architecture only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.machine())}, {os.cpu_count()} cores"
