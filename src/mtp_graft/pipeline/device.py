"""Which device the stages compute on, and what results call it."""

import os
import platform
from functools import cache
from pathlib import Path

import torch

from mtp_graft.recipe import Device
from mtp_graft.serving.topology import Hardware, find_gpus, visible_devices


@cache
def gpus() -> Hardware | None:
    """Return the GPUs that torch will see; None for its CPU build, or on a machine without any.

    The driver is asked: a CUDA context in this process would take memory from what it starts.
    Raises GraftError for a driver that does not work, and for GPUs of several kinds.
    """
    if torch.version.cuda is None or visible_devices() == []:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return None
    except pynvml.NVMLError:
        pass  # which `find_gpus` explains
    return find_gpus()


def torch_device(wanted: Device) -> Device:
    """Return the recipe's device, `auto` being the GPU if there is one."""
    return wanted if wanted != "auto" else "cuda" if gpus() else "cpu"


def device_name() -> str:
    """Return the GPUs' or the processor's model and how many, for manifests and the report."""
    if found := gpus():
        return f"{found.num_gpus}x {found.gpu}"
    cpuinfo = Path("/proc/cpuinfo")  # on Linux `platform` knows the architecture only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.machine())}, {os.cpu_count()} cores"
