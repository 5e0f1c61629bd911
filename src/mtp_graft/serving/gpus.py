"""GPUs that the project names, with the memory that their driver reports."""

from dataclasses import dataclass

from mtp_graft.errors import UsageError

_NVIDIA_SMI = "total that nvidia-smi reports"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; `words` are what its name has to contain to be recognized."""

    name: str
    memory_mib: int
    pcie_only: bool  # no NVLink between the GPUs of a host, as these cards are usually built in
    unified_memory: bool  # shared with the CPU and all else that runs there
    words: tuple[str, ...]
    source: str

    @property
    def memory_bytes(self) -> int:
        """Return the whole memory, of which vLLM gets `gpu_memory_utilization`."""
        return self.memory_mib * 2**20


#: In the order of matching: the first whose words are all in a name is it.
GPUS = (
    Gpu(
        "RTX PRO 6000 Max-Q",
        97887,
        pcie_only=True,
        unified_memory=False,
        words=("6000", "max", "q"),
        source=f"{_NVIDIA_SMI}; PCIe only: Acti card",
    ),
    Gpu(
        "RTX PRO 6000 Server",
        97887,
        pcie_only=True,
        unified_memory=False,
        words=("6000", "server"),
        source=f"{_NVIDIA_SMI}; no NVLink connector: NVIDIA's product page",
    ),
    Gpu(
        "GB10",
        124610,
        pcie_only=False,
        unified_memory=True,
        words=("gb10",),
        source="121.69 GiB that CUDA reports of 128 GB, from users' reports; one GPU a machine",
    ),
    Gpu(
        "GB10",
        124610,
        pcie_only=False,
        unified_memory=True,
        words=("dgx", "spark"),
        source="the GPU of a DGX Spark, see above",
    ),
    Gpu(
        "H100",
        81559,
        pcie_only=False,
        unified_memory=False,
        words=("h100",),
        source=f"{_NVIDIA_SMI} for the SXM 80 GB version",
    ),
    Gpu(
        "H200",
        143771,
        pcie_only=False,
        unified_memory=False,
        words=("h200",),
        source=f"{_NVIDIA_SMI} for the SXM version",
    ),
)


def find_gpu(name: str) -> Gpu:
    """Return the GPU that `name` means, be it our name, NVIDIA's or a part of it.

    Raises UsageError for a name that means none of them.
    """
    said = name.lower()
    for gpu in GPUS:
        if all(word in said for word in gpu.words):
            return gpu
    known = ", ".join(dict.fromkeys(gpu.name for gpu in GPUS))
    raise UsageError(f"--gpu {name}: not a GPU known here; expected one of {known}")
