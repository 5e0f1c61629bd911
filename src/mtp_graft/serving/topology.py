"""The hardware that a server is to run on, and how its ranks reach each other."""

import os
import re
import subprocess
from dataclasses import dataclass
from typing import Literal

from mtp_graft.errors import GraftError
from mtp_graft.serving.gpus import find_gpu, known_gpu
from mtp_graft.serving.profiles import UNIFIED_MEMORY_UTILIZATION

Link = Literal["none", "nvlink", "pcie", "network"]
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Hardware:
    """GPUs of one kind; `gpu` None is a CPU."""

    gpu: str | None
    num_gpus: int = 0
    memory_bytes: int = 0  # of one GPU
    link: Link = "none"  # the slowest between two ranks
    num_nodes: int = 1
    unified_memory: bool = False  # shared with the CPU and what else runs there

    @property
    def most_utilization(self) -> float:
        """Return the largest share of a GPU's memory that vLLM may take (0..1)."""
        return UNIFIED_MEMORY_UTILIZATION if self.unified_memory else 1.0

    def __str__(self) -> str:
        if self.gpu is None:
            return "CPU"
        how = {
            "none": "",
            "nvlink": ", NVLink",
            "pcie": ", PCIe only",
            "network": f", {self.num_nodes} nodes",
        }
        return f"{self.num_gpus}x {self.gpu}, {self.memory_bytes / 2**30:.1f} GiB{how[self.link]}"


CPU = Hardware(None)


def names_cpu(gpu: str | None) -> bool:
    """Return whether `--gpu` says that it is no GPU."""
    return gpu is not None and gpu.lower() == "cpu"


def named_gpus(name: str, count: int, num_nodes: int | None = None) -> Hardware:
    """Return `count` of the GPUs that the project knows as `name`, in all.

    A GPU with unified memory is alone in its machine, so `num_nodes` is their number by itself.
    Raises GraftError for an unknown name, and for a count that the machines cannot share.
    """
    gpu = find_gpu(name)
    nodes = num_nodes or (count if gpu.unified_memory else 1)
    if count % nodes:
        raise GraftError(f"--count {count} in --nnodes {nodes}: expected as many in each")
    if nodes > 1:
        link: Link = "network"
    elif count == 1:
        link = "none"
    else:
        link = "pcie" if gpu.pcie_only else "nvlink"
    return Hardware(gpu.name, count, gpu.memory_bytes, link, nodes, gpu.unified_memory)


def find_gpus(num_nodes: int = 1) -> Hardware:
    """Return what `nvidia-smi` says of this machine, and `num_nodes - 1` more like it.

    Raises GraftError if it cannot be run, or if the GPUs are of several kinds.
    """
    query = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in _nvidia_smi(*_visible(), *query)]
    if len({name for name, _ in rows}) != 1:
        raise GraftError(
            f"nvidia-smi: found {', '.join(name for name, _ in rows) or 'no GPU'}; expected GPUs "
            "of one kind: choose with CUDA_VISIBLE_DEVICES"
        )
    name, memory_mib = rows[0]
    link: Link = "network" if num_nodes > 1 else "none" if len(rows) == 1 else _slowest_link()
    gpu = known_gpu(name)
    if memory_mib.isdigit():
        memory_bytes = int(memory_mib) * 2**20
    elif gpu is not None:  # [N/A]: the memory is the machine's
        memory_bytes = gpu.memory_bytes
    else:
        raise GraftError(
            f"nvidia-smi: {name} has {memory_mib} of memory, and how much that is is not known "
            "here; --profile none serves without an estimate"
        )
    unified = gpu is not None and gpu.unified_memory
    return Hardware(name, len(rows) * num_nodes, memory_bytes, link, num_nodes, unified)


def hardware_for(platform: str) -> Hardware:
    """Return what a vLLM built for `platform` ("cpu" or "cuda") finds on this machine."""
    return CPU if platform == "cpu" else find_gpus()


def _visible() -> tuple[str, ...]:
    """Return the option that limits nvidia-smi to the GPUs that vLLM will see."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return () if chosen is None else (f"--id={chosen}",)


def _slowest_link() -> Link:
    """Return `pcie` if any pair of GPUs has no NVLink (`NV` and a number in the matrix).

    All GPUs of the machine are looked at, also those that CUDA_VISIBLE_DEVICES leaves out.
    """
    matrix = [_ANSI.sub("", line).split() for line in _nvidia_smi("topo", "-m")]
    rows = [row for row in matrix if row[0].startswith("GPU") and "X" in row]  # not the legend
    pairs = {cell for row in rows for cell in row[1 : 1 + len(rows)] if cell != "X"}
    return "nvlink" if pairs and all(cell.startswith("NV") for cell in pairs) else "pcie"


def _nvidia_smi(*arguments: str) -> list[str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise GraftError(
            f"nvidia-smi {' '.join(arguments)}: failed ({error}); vLLM is a CUDA build: is the "
            "driver there? With --dry-run, --gpu NAME --count N name GPUs that are elsewhere; "
            "--profile none serves without looking"
        ) from error
    return [line for line in done.stdout.splitlines() if line.strip()]
