"""Which device the stages compute on, and what results call it."""

import os
import platform
from functools import cache
from pathlib import Path

import torch

from mtp_graft.recipe import Device
from mtp_graft.serving.topology import Gpu, visible_gpus


def find_gpus() -> list[Gpu]:
    """Return the GPUs that torch can use, none for its CPU build."""
    return [] if torch.version.cuda is None else visible_gpus()


@cache
def gpu_names() -> tuple[str, ...]:
    """Return the GPUs' names; raises GraftError as `find_gpus` does."""
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
