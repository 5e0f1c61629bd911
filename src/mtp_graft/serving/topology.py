"""The hardware that a server is to run on: which GPUs, and how their ranks reach each other."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import combinations, takewhile
from typing import Any

from pydantic.dataclasses import dataclass

from mtp_graft.checkpoint.quantization_config import read_quantization
from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving.command import Platform
from mtp_graft.serving.profiles import GPUS, UNIFIED_MEMORY_UTILIZATION


@dataclass(frozen=True)
class Hardware:
    """GPUs of one kind; `gpu` None is a CPU."""

    gpu: str | None
    num_gpus: int = 0
    memory_bytes: int = 0  # of one GPU, or of the machine; 0: not known
    has_nvlink: bool = False  # between all GPUs of a machine
    num_nodes: int = 1
    unified_memory: bool = False
    capability: tuple[int, int] = (0, 0)  # of CUDA; (0, 0): not known

    @property
    def platform(self) -> Platform:
        """Return which vLLM runs on it."""
        return "cpu" if self.gpu is None else "cuda"

    @property
    def is_pcie_only(self) -> bool:
        """Return whether ranks of one machine reach each other over PCIe alone."""
        return self.num_nodes == 1 and self.num_gpus > 1 and not self.has_nvlink

    @property
    def most_utilization(self) -> float:
        """Return the largest share of a GPU's memory that vLLM may take (0..1)."""
        return UNIFIED_MEMORY_UTILIZATION if self.unified_memory else 1.0

    def __str__(self) -> str:
        if self.gpu is None:
            return "CPU"
        link = ", PCIe only" if self.is_pcie_only else ", NVLink" if self.num_gpus > 1 else ""
        link = f", {self.num_nodes} nodes" if self.num_nodes > 1 else link
        return f"{self.num_gpus}x {self.gpu}, {self.memory_bytes / 2**30:.1f} GiB{link}"


#: Major compute capabilities that vLLM 0.32 and 0.33 have attention kernels for; 0: not known.
ATTENTION = (0, 9, 10, 12)
CPU = Hardware(None, memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
#: What options can name.
_BY_NAME = {"cpu": CPU} | {n.lower(): Hardware(n, 1, **facts) for n, facts in GPUS.items()}


def named_hardware(name: str, count: int = 1, num_nodes: int | None = None) -> Hardware:
    """Return `count` of the GPUs that the project knows as `name`, in all; `cpu` is none.

    A GPU with unified memory is alone in its machine, so `num_nodes` is their number by itself.
    Raises UsageError for an unknown name and GraftError for a count that the machines cannot share.
    """
    if (known := _BY_NAME.get(name.lower())) is None:
        names = ", ".join(("cpu", *GPUS))
        raise UsageError(f"--gpu {name}: not a GPU known here; expected one of {names}")
    if known.gpu is None:
        return known
    nodes = num_nodes or (count if known.unified_memory else 1)
    if count % nodes:
        raise GraftError(f"--count {count} in --nnodes {nodes}: expected as many in each")
    return replace(known, num_gpus=count, num_nodes=nodes)


def find_gpus(num_nodes: int = 1) -> Hardware:
    """Return the GPUs of this machine that vLLM will see, and `num_nodes - 1` machines like it.

    Of MIG instances that is one: CUDA shows no process more. Raises GraftError if there is no
    driver or no GPU, or if the GPUs are of several kinds.
    """
    import pynvml

    here = f"this machine (CUDA_VISIBLE_DEVICES {os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')})"
    try:
        pynvml.nvmlInit()
        gpus = _visible(pynvml)
        names = sorted({pynvml.nvmlDeviceGetName(gpu) for gpu in gpus})
        if len(names) != 1:
            expected = "expected GPUs of one kind: choose with CUDA_VISIBLE_DEVICES"
            raise GraftError(f"{here}: found {', '.join(names) or 'no GPU'}; {expected}")
        known = _BY_NAME.get(names[0].lower().removeprefix("nvidia "), Hardware(None))
        memory = _told(pynvml, "MemoryInfo", gpus[0])  # not where it is the machine's
        memory_bytes = int(memory.total) if memory else known.memory_bytes
        whole = _told(pynvml, "DeviceHandleFromMigDeviceHandle", gpus[0])
        of = gpus[0] if whole is None else whole
        capability = _told(pynvml, "CudaComputeCapability", of) or known.capability
        has_nvlink = len(gpus) > 1 and all(
            _told(pynvml, "P2PStatus", *pair, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
            == pynvml.NVML_P2P_STATUS_OK
            for pair in combinations(gpus, 2)
        )
    except pynvml.NVMLError as error:
        found = f"NVIDIA's driver says {error}; vLLM is a CUDA build: is the driver there?"
        cure = "With --dry-run, --gpu NAME --count N name others; --profile none does not look"
        raise GraftError(f"{here}: {found} {cure}") from error
    machines = (len(gpus) * num_nodes, memory_bytes, has_nvlink, num_nodes)
    return Hardware(names[0], *machines, known.unified_memory, capability)


def hardware_for(platform: Platform) -> Hardware:
    """Return what a vLLM built for `platform` finds on this machine."""
    return CPU if platform == "cpu" else find_gpus()


def visible_devices() -> list[str] | None:
    """Return CUDA_VISIBLE_DEVICES, without what an empty or negative entry hides; None if unset."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return None
    entries = map(str.strip, chosen.split(","))
    return list(takewhile(lambda entry: entry and entry[0] != "-", entries))


def _visible(pynvml: Any) -> list[Any]:
    """Return the driver's handles of the GPUs that CUDA shows, or of one MIG instance."""
    if (chosen := visible_devices()) is None:
        chosen = list(map(str, range(pynvml.nvmlDeviceGetCount())))
    gpus = [
        pynvml.nvmlDeviceGetHandleByIndex(int(device))
        if device.isdecimal()
        else pynvml.nvmlDeviceGetHandleByUUID(device)
        for device in chosen
    ]
    for gpu in gpus:
        if _told(pynvml, "DeviceHandleFromMigDeviceHandle", gpu) is not None:
            return [gpu]
        if (_told(pynvml, "MigMode", gpu) or [0])[0]:  # now; after it, what is pending
            return [pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0)]
    return gpus


def _told(pynvml: Any, what: str, *of: Any) -> Any:
    """Return what the driver says of GPUs; None where it has no answer for their kind."""
    with suppress(pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument):
        return getattr(pynvml, f"nvmlDeviceGet{what}")(*of)
    return None


def most_ranks(config: Mapping[str, Any], num_gpus: int) -> int:
    """Return the largest power of two of GPUs that share the model evenly; 1 without any."""
    most = 1
    while 2 * most <= num_gpus and not undivided(config, 2 * most):
        most *= 2
    return most


def undivided(config: Mapping[str, Any], ranks: int, group: int | None = None) -> dict[str, int]:
    """Return config key -> unit of what ranks cannot share; `group` is by the config by default."""
    layers = range(config["num_hidden_layers"] + 1)
    group = group or max(1, read_quantization(config).group_size(layers))
    units = {"num_attention_heads": 1, "o_groups": 1, "moe_intermediate_size": group}
    return {key: unit for key, unit in units.items() if config[key] % (ranks * unit)}
