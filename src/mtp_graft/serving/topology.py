"""The hardware that a server is to run on: which GPUs, and how their ranks reach each other."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from mtp_graft.checkpoint.quantization_config import INTEGERS, int4_group_size
from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving.command import Platform
from mtp_graft.serving.profiles import UNIFIED_MEMORY_UTILIZATION


@dataclass(frozen=True)
class Hardware:
    """GPUs of one kind; `gpu` None is a CPU."""

    gpu: str | None
    num_gpus: int = 0
    memory_bytes: int = 0  # of one GPU, or of the machine; 0: not known
    has_nvlink: bool = False  # between all GPUs of a machine
    num_nodes: int = 1
    unified_memory: bool = False

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


CPU = Hardware(None, memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
_MIB = 2**20
#: What options can name. The memory is what the driver reports; H100 and H200 are SXM. GB10 (DGX
#: Spark): from users' reports.
_NAMED = (
    CPU,
    Hardware("RTX PRO 6000 Max-Q", 1, 97887 * _MIB),
    Hardware("RTX PRO 6000 Server", 1, 97887 * _MIB),
    Hardware("GB10", 1, 124610 * _MIB, unified_memory=True),
    Hardware("H100", 1, 81559 * _MIB, has_nvlink=True),
    Hardware("H200", 1, 143771 * _MIB, has_nvlink=True),
)
_BY_NAME = {(hardware.gpu or "cpu").lower(): hardware for hardware in _NAMED}


def named_hardware(name: str, count: int = 1, num_nodes: int | None = None) -> Hardware:
    """Return `count` of the GPUs that the project knows as `name`, in all; `cpu` is none.

    A GPU with unified memory is alone in its machine, so `num_nodes` is their number by itself.
    Raises UsageError for an unknown name and GraftError for a count that the machines cannot share.
    """
    known = _BY_NAME.get(name.lower())
    if known is None:
        names = ", ".join(hardware.gpu or "cpu" for hardware in _NAMED)
        raise UsageError(f"--gpu {name}: not a GPU known here; expected one of {names}")
    if known.gpu is None:
        return known
    nodes = num_nodes or (count if known.unified_memory else 1)
    if count % nodes:
        raise GraftError(f"--count {count} in --nnodes {nodes}: expected as many in each")
    return replace(known, num_gpus=count, num_nodes=nodes)


def find_gpus(num_nodes: int = 1) -> Hardware:
    """Return the GPUs of this machine that vLLM will see, and `num_nodes - 1` machines like it.

    Raises GraftError if there is no driver or no GPU, or if the GPUs are of several kinds.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        gpus = _visible(pynvml)
        names = sorted({pynvml.nvmlDeviceGetName(gpu) for gpu in gpus})
        if len(names) != 1:
            raise GraftError(
                f"this machine: found {', '.join(names) or 'no GPU'}; expected GPUs of one kind: "
                "choose with CUDA_VISIBLE_DEVICES"
            )
        known = _BY_NAME.get(names[0].lower().removeprefix("nvidia "), Hardware(None))
        memory_bytes = known.memory_bytes
        with suppress(pynvml.NVMLError_NotSupported):  # where it is the machine's
            memory_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(gpus[0]).total)
        has_nvlink = len(gpus) > 1 and all(
            pynvml.nvmlDeviceGetP2PStatus(*pair, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
            == pynvml.NVML_P2P_STATUS_OK
            for pair in combinations(gpus, 2)
        )
    except pynvml.NVMLError as error:
        raise GraftError(
            f"this machine's GPUs: NVIDIA's driver says {error}; vLLM is a CUDA build: is the "
            "driver there? With --dry-run, --gpu NAME --count N name GPUs that are elsewhere; "
            "--profile none serves without looking"
        ) from error
    count = len(gpus) * num_nodes
    return Hardware(names[0], count, memory_bytes, has_nvlink, num_nodes, known.unified_memory)


def hardware_for(platform: Platform) -> Hardware:
    """Return what a vLLM built for `platform` finds on this machine."""
    return CPU if platform == "cpu" else find_gpus()


def _visible(pynvml: Any) -> list[Any]:
    """Return the driver's handles of the GPUs that CUDA_VISIBLE_DEVICES leaves."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        chosen = ",".join(map(str, range(pynvml.nvmlDeviceGetCount())))
    return [
        pynvml.nvmlDeviceGetHandleByIndex(int(device))
        if device.isdecimal()
        else pynvml.nvmlDeviceGetHandleByUUID(device)
        for device in map(str.strip, filter(None, chosen.split(",")))
    ]


def most_ranks(config: Mapping[str, Any], num_gpus: int) -> int:
    """Return the largest power of two of GPUs that share the model evenly; 1 without any."""
    most = 1
    while 2 * most <= num_gpus and not undivided(config, 2 * most):
        most *= 2
    return most


def undivided(config: Mapping[str, Any], ranks: int) -> str | None:
    """Return what of heads, output groups and the experts' scale groups cannot be shared out.

    Raises GraftError for a config, its dimensions checked, that is not in W4A16-FP8.
    """
    group = int4_group_size(config.get("quantization_config") or {}, INTEGERS)
    heads, groups = config["num_attention_heads"], config["o_groups"]
    inner = config["moe_intermediate_size"]
    if heads % ranks:
        return f"{heads} attention heads"
    if groups % ranks:
        return f"{groups} output groups"
    if inner % (ranks * group):
        return f"moe_intermediate_size {inner} in groups of {group} that share a scale"
    return None
