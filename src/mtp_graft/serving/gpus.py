"""GPUs that the project names, with the memory that their driver reports."""

import re
from dataclasses import dataclass

from mtp_graft.errors import UsageError

_NVIDIA_SMI = "total that nvidia-smi reports"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; `pattern` matches the whole of its lower-case names."""

    name: str
    memory_mib: int
    pcie_only: bool  # no NVLink between the GPUs of a host, as these cards are usually built in
    unified_memory: bool  # shared with the CPU and all else that runs there
    pattern: str
    source: str

    @property
    def memory_bytes(self) -> int:
        """Return the whole memory, of which vLLM gets `gpu_memory_utilization`."""
        return self.memory_mib * 2**20


GPUS = (
    Gpu(
        "RTX PRO 6000 Max-Q",
        97887,
        pcie_only=True,
        unified_memory=False,
        pattern=r"((rtx )?pro )?6000 (blackwell )?max[- ]?q( workstation edition)?",
        source=f"{_NVIDIA_SMI}; PCIe only: Acti card",
    ),
    Gpu(
        "RTX PRO 6000 Server",
        97887,
        pcie_only=True,
        unified_memory=False,
        pattern=r"((rtx )?pro )?6000 (blackwell )?server( edition)?",
        source=f"{_NVIDIA_SMI}; no NVLink connector: NVIDIA's product page",
    ),
    Gpu(
        "GB10",
        124610,
        pcie_only=False,
        unified_memory=True,
        pattern=r"gb10|dgx spark",
        source="121.69 GiB that CUDA reports of 128 GB, from users' reports; one GPU a machine",
    ),
    Gpu(
        "H100",
        81559,
        pcie_only=False,
        unified_memory=False,
        pattern=r"h100( sxm5?)?( 80gb)?( hbm3)?",
        source=f"{_NVIDIA_SMI} for the SXM 80 GB version",
    ),
    Gpu(
        "H200",
        143771,
        pcie_only=False,
        unified_memory=False,
        pattern=r"h200( sxm5?)?( 141gb)?( hbm3e)?",
        source=f"{_NVIDIA_SMI} for the SXM version",
    ),
)


def known_gpu(name: str) -> Gpu | None:
    """Return the GPU that `name` means, be it our name or NVIDIA's; None for another."""
    said = name.lower().removeprefix("nvidia ")
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, said)), None)


def find_gpu(name: str) -> Gpu:
    """Return the GPU that `name` means; raises UsageError for a name that means none of them."""
    gpu = known_gpu(name)
    if gpu is None:
        known = ", ".join([*(gpu.name for gpu in GPUS), "cpu"])
        raise UsageError(f"--gpu {name}: not a GPU known here; expected one of {known}")
    return gpu
