"""What results call the device, and that finding out leaves CUDA alone."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from mtp_graft.pipeline.device import device_name, find_gpus, gpu_names, torch_device
from serving.conftest import NvmlLibraryNotFound, install_gpus


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    gpu_names.cache_clear()
    yield
    gpu_names.cache_clear()


def test_the_driver_says_which_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, "NVIDIA H200", "NVIDIA H200", memory_mib=9)
    assert device_name() == "2x NVIDIA H200"
    assert torch_device("auto") == "cuda" and torch_device("cpu") == "cpu"
    assert [(gpu.free, gpu.total) for gpu in find_gpus()] == [(7 * 2**20, 9 * 2**20)] * 2


def test_without_a_driver_or_cuda_the_device_is_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_gpus(monkeypatch, error=NvmlLibraryNotFound())
    assert device_name().endswith(" cores") and torch_device("auto") == "cpu"
    install_gpus(monkeypatch, "NVIDIA H200", memory_mib=9)
    monkeypatch.setattr(torch.version, "cuda", None)
    gpu_names.cache_clear()
    assert device_name().endswith(" cores")


@pytest.mark.gpu
def test_the_name_is_torchs_own_and_cuda_stays_unused() -> None:
    script = (
        "import torch; from mtp_graft.pipeline.device import device_name; print(device_name());"
        "assert not torch.cuda.is_initialized();"
        "print(f'{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ours, torchs = done.stdout.splitlines()
    assert ours == torchs
