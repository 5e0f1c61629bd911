"""A stand-in vLLM installation and checkpoints that have names but next to no bytes."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtp_graft.serving import command, server

from .flash import CONFIG, with_head

FAKE_VLLM = Path(__file__).with_name("fake_vllm.py")
BASE_TENSORS = ("embed.weight", "layers.0.attn.wq_a.weight")
HEAD_TENSORS = ("mtp.0.e_proj.weight",)


def install(site: Path, name: str = "vllm", version: str = "0.32.0+cpu") -> None:
    """Make `site` look as if pip had installed vLLM there."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").touch()
    for module in ("cli/main.py", "openai/api_server.py"):
        file = site / "vllm" / "entrypoints" / module
        file.parent.mkdir(parents=True, exist_ok=True)
        for package in file.relative_to(site).parents[:-1]:
            (site / package / "__init__.py").touch()  # else an installed vLLM goes first
        file.write_text(f"import runpy\nrunpy.run_path({str(FAKE_VLLM)!r}, run_name='__main__')\n")


def only_from(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing but `site` count as installed."""

    def distribution(name: str) -> Distribution:
        for dist in Distribution.discover(name=name, path=[str(site)]):
            return dist
        raise PackageNotFoundError(name)

    monkeypatch.setattr(command, "distribution", distribution)


class NvmlError(Exception):
    """Stands for pynvml.NVMLError."""


class NoAnswer(NvmlError):
    """What it raises where the driver has no answer for a kind of GPU."""


class NoDriver(NvmlError):
    """What it raises on a machine without NVIDIA's driver."""


def install_gpus(
    monkeypatch: pytest.MonkeyPatch, *gpus: str, memory_mib: int | None = None,
    nvlinks: Collection[tuple[int, int]] = (), error: str | NvmlError | None = None,
    capability: tuple[int, int] | None = None, instances: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Let NVIDIA's driver tell of GPUs by these names, and of links between some of them.

    `instances` are the MIG instances of the first one.
    """

    def initialize() -> None:
        if error:
            raise error if isinstance(error, NvmlError) else NvmlError(error)

    def if_told(answer: object) -> Any:
        if answer is None:
            raise NoAnswer("Not Supported")
        return answer

    def by_uuid(uuid: str) -> int:
        kind, number = uuid.split("-")
        return int(number) + (num_gpus if kind == "MIG" else 0)

    num_gpus, memory = len(gpus), memory_mib and SimpleNamespace(total=memory_mib * 2**20)

    stand_in = SimpleNamespace(
        NVMLError=NvmlError,
        **dict.fromkeys(("NVMLError_NotSupported", "NVMLError_InvalidArgument"), NoAnswer),
        **dict.fromkeys(("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"), NoDriver),
        NVML_P2P_CAPS_INDEX_NVLINK=2,
        NVML_P2P_STATUS_OK=0,
        nvmlInit=initialize,
        nvmlDeviceGetCount=lambda: len(gpus),
        nvmlDeviceGetHandleByIndex=int,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetName=(*gpus, *instances).__getitem__,
        nvmlDeviceGetMemoryInfo=lambda _gpu: if_told(memory),
        nvmlDeviceGetCudaComputeCapability=lambda g: if_told(capability if g < num_gpus else None),
        nvmlDeviceGetMigMode=lambda gpu: if_told([1, 1] if instances and gpu == 0 else None),
        nvmlDeviceGetMigDeviceHandleByIndex=lambda _gpu, index: num_gpus + index,
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda g: if_told(None if g < num_gpus else 0),
        nvmlDeviceGetP2PStatus=lambda a, b, _kind: 0 if (a, b) in nvlinks else 5,
    )
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture(scope="session")
def good(spliced: dict[str, Path]) -> Path:
    """A checkpoint with a head in INT4."""
    return spliced["rtn"]


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """The same by links, for defects, which replace files and never write to them."""
    return shutil.copytree(good, tmp_path / "rtn", copy_function=os.link)


@pytest.fixture
def planted(copy: Path) -> Callable[[str], Path]:
    from .doctor_defects import DEFECTS

    def plant(name: str) -> Path:
        DEFECTS[name][1](copy)
        return copy

    return plant


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages folder with the stand-in, a CPU build of vLLM 0.32.0."""
    site = tmp_path / "env" / "site-packages"
    install(site)
    return site


@pytest.fixture
def vllm(site: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """What starts the stand-in, the only vLLM that this process and its children see."""
    only_from(site, monkeypatch)
    monkeypatch.setattr(server, "POLL_S", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    for name in ("OMP_NUM_THREADS", "FAKE_VLLM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")


@pytest.fixture
def fake(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def configure(**settings: Any) -> None:
        monkeypatch.setenv("FAKE_VLLM", json.dumps(settings))

    return configure


def write_checkpoint(folder: Path, tensors: tuple[str, ...]) -> Path:
    folder.mkdir(parents=True)
    small = {"hc_mult": 2, "hidden_size": 4, "num_hidden_layers": 1}
    config = CONFIG | small | {"max_position_embeddings": None}
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", BASE_TENSORS)


@pytest.fixture
def grafted(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "grafted", BASE_TENSORS + HEAD_TENSORS)


@pytest.fixture(scope="session")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V4-Flash without its bytes."""
    return with_head().write(tmp_path_factory.mktemp("flash") / "checkpoint")


def read_record(file: Path, timeout_s: float = 20.0) -> Any:
    """Wait for the stand-in's record of its arguments, environment and process ids."""
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        assert time.monotonic() < deadline, f"{file}: the stand-in never started"
        time.sleep(0.02)
    return json.loads(file.read_text())


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_gone(pids: list[int], timeout_s: float = 10.0) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def left_behind(record: Path) -> list[object]:
    """Return what a stand-in has left: processes, and the folder that it had for its sockets."""
    found = read_record(record)
    left, sockets = wait_gone(found["pids"]), Path(found["env"]["VLLM_RPC_BASE_PATH"])
    deadline = time.monotonic() + 10  # a killed parent's watcher removes it
    while sockets.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return [*left, *([sockets] if sockets.exists() else [])]
