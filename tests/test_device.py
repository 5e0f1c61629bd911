"""What results call the device, and that finding out leaves CUDA alone."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from mtp_graft.errors import GraftError
from mtp_graft.stages.parallel import device_name, find_device, gpus
from serving.conftest import NoDriver, install_gpus


@pytest.fixture(autouse=True)
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CUDA build of torch, which must not be asked in this process."""
    gpus.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("is_available", "device_count", "get_device_name", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("asked in this process"))
    yield
    gpus.cache_clear()


def test_the_driver_names_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, "NVIDIA H200", "NVIDIA H200", memory_mib=143771)
    assert device_name() == "2x NVIDIA H200"
    assert find_device("auto") == "cuda" and find_device("cpu") == "cpu"


@pytest.mark.parametrize("why", ["CPU build", "no driver", "hidden"])
def test_without_gpus_the_processor_is_named(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = NoDriver("Driver Not Loaded") if why == "no driver" else None
    install_gpus(monkeypatch, "NVIDIA H200", memory_mib=143771, error=error)
    if why == "CPU build":
        monkeypatch.setattr(torch.version, "cuda", None)
    if why == "hidden":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_name().endswith(" cores")
    assert find_device("auto") == "cpu"


def test_a_driver_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, error="Driver/library version mismatch")
    with pytest.raises(GraftError, match="driver says Driver/library version mismatch"):
        device_name()


@pytest.mark.gpu
def test_the_name_is_torchs_own_and_cuda_stays_unused() -> None:
    script = (
        "import torch; from mtp_graft.stages.parallel import device_name; print(device_name());"
        "assert not torch.cuda.is_initialized();"
        "print(f'{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}')"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours, torchs = done.stdout.splitlines()
    assert ours == torchs
