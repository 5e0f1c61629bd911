"""Which device the stages compute on, and what results call it."""

import platform

import torch


def torch_device(wanted: str) -> str:
    """Return the recipe's device, `auto` being the GPU if there is one."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Return the device with the machine's processor, for manifests and the report."""
    return f"{torch_device('auto')} ({platform.processor() or platform.machine()})"
