"""The hardware that a server is to run on: which GPUs, and how their ranks reach each other."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

from mtp_graft.checkpoint.quantization_config import int4_group_size
from mtp_graft.errors import GraftError, UsageError, in_words
from mtp_graft.serving.profiles import UNIFIED_MEMORY_UTILIZATION

Link = Literal["none", "nvlink", "pcie", "network"]


@dataclass(frozen=True)
class Hardware:
    """GPUs of one kind; `gpu` None is a CPU."""

    gpu: str | None
    num_gpus: int = 0
    memory_bytes: int = 0  # of one GPU
    link: Link = "none"  # the slowest between two ranks
    num_nodes: int = 1
    unified_memory: bool = False

    @property
    def most_utilization(self) -> float:
        """Return the largest share of a GPU's memory that vLLM may take (0..1)."""
        return UNIFIED_MEMORY_UTILIZATION if self.unified_memory else 1.0

    def __str__(self) -> str:
        if self.gpu is None:
            return "CPU"
        network = f", {self.num_nodes} nodes"
        how = {"none": "", "nvlink": ", NVLink", "pcie": ", PCIe only", "network": network}
        return f"{self.num_gpus}x {self.gpu}, {self.memory_bytes / 2**30:.1f} GiB{how[self.link]}"


CPU = Hardware(None)
_MIB = 2**20
_PRO_6000 = r"((rtx )?pro )?6000 (blackwell )?"
#: GPUs that options can name, by a pattern of their lower-case names, as two of them are built in.
#: The memory is what the driver reports; H100 and H200 are SXM. GB10: from users' reports.
GPUS: Mapping[str, Hardware] = {
    rf"{_PRO_6000}max[- ]?q( workstation edition)?": Hardware(
        "RTX PRO 6000 Max-Q", 2, 97887 * _MIB, "pcie"
    ),
    rf"{_PRO_6000}server( edition)?": Hardware("RTX PRO 6000 Server", 2, 97887 * _MIB, "pcie"),
    r"gb10|dgx spark": Hardware("GB10", 2, 124610 * _MIB, "network", 2, unified_memory=True),
    r"h100( sxm5?)?( 80gb)?( hbm3)?": Hardware("H100", 2, 81559 * _MIB, "nvlink"),
    r"h200( sxm5?)?( 141gb)?( hbm3e)?": Hardware("H200", 2, 143771 * _MIB, "nvlink"),
}


def names_cpu(gpu: str | None) -> bool:
    """Return whether `--gpu` says that it is no GPU."""
    return gpu is not None and gpu.lower() == "cpu"


def named_gpus(name: str, count: int, num_nodes: int | None = None) -> Hardware:
    """Return `count` of the GPUs that the project knows as `name`, in all.

    A GPU with unified memory is alone in its machine, so `num_nodes` is their number by itself.
    Raises UsageError for an unknown name and GraftError for a count that the machines cannot share.
    """
    known = _known(name)
    if known is None:
        names = ", ".join(str(gpu.gpu) for gpu in GPUS.values())
        raise UsageError(f"--gpu {name}: not a GPU known here; expected one of {names}, cpu")
    nodes = num_nodes or (count if known.unified_memory else 1)
    if count % nodes:
        raise GraftError(f"--count {count} in --nnodes {nodes}: expected as many in each")
    link = _link(count, nodes, is_nvlink=known.link != "pcie")
    return replace(known, num_gpus=count, num_nodes=nodes, link=link)


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
        memory_bytes = _memory_bytes(pynvml, gpus[0], names[0])
        is_nvlink = all(
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
    count, known = len(gpus) * num_nodes, _known(names[0])
    link = _link(count, num_nodes, is_nvlink)
    is_unified = known is not None and known.unified_memory
    return Hardware(names[0], count, memory_bytes, link, num_nodes, is_unified)


def hardware_for(platform: str) -> Hardware:
    """Return what a vLLM built for `platform` ("cpu" or "cuda") finds on this machine."""
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


def _memory_bytes(pynvml: Any, gpu: Any, name: str) -> int:
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(gpu).total)
    except pynvml.NVMLError_NotSupported:  # the memory is the machine's
        known = _known(name)
        if known is None:
            raise GraftError(
                f"{name}: the driver does not say how much memory it has, and it is not known "
                "here; --profile none serves without an estimate"
            ) from None
        return known.memory_bytes


def _known(name: str) -> Hardware | None:
    """Return the GPU that `name` means, be it our name or NVIDIA's; None for another."""
    said = name.lower().removeprefix("nvidia ")
    return next((gpu for pattern, gpu in GPUS.items() if re.fullmatch(pattern, said)), None)


def _link(count: int, num_nodes: int, is_nvlink: bool) -> Link:
    if num_nodes > 1:
        return "network"
    return "none" if count == 1 else "nvlink" if is_nvlink else "pcie"


def most_ranks(config: Mapping[str, Any], num_gpus: int) -> int:
    """Return the largest power of two of GPUs that share the model evenly; 1 without any.

    Raises GraftError as `undivided`.
    """
    most = 1
    while 2 * most <= num_gpus and not undivided(config, 2 * most):
        most *= 2
    return most


def undivided(config: Mapping[str, Any], ranks: int) -> str | None:
    """Return what of heads, output groups and the experts' scale groups cannot be shared out.

    Raises GraftError for a config that is not a DeepSeek-V4's in W4A16-FP8.
    """
    try:
        group = int4_group_size(config["quantization_config"])
        inner = config["moe_intermediate_size"]
        heads, output_groups = config["num_attention_heads"], config["o_groups"]
        if heads % ranks:
            return f"{heads} attention heads"
        if output_groups % ranks:
            return f"{output_groups} output groups"
        if inner % (ranks * group):
            return f"moe_intermediate_size {inner} in groups of {group} that share a scale"
    except (KeyError, TypeError, AttributeError) as error:
        raise GraftError(
            f"config.json: {in_words(error)}; expected a DeepSeek-V4 in W4A16-FP8"
        ) from None
    return None
