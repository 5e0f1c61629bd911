"""Which device the stages compute on, and what results call it."""

import os
import platform
from pathlib import Path

import torch


def torch_device(wanted: str) -> str:
    """Return the recipe's device, `auto` being the GPU if there is one."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Return the GPUs' or the processor's model and how many, for manifests and the report."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}"
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    """Return the processor's model; on Linux `platform` knows its architecture only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
