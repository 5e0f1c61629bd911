"""What results call the device, and that finding out leaves CUDA alone."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mtp_graft.errors import GraftError
from mtp_graft.pipeline.device import Gpu, device_name, find_gpus, gpu_names, torch_device


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    gpu_names.cache_clear()
    yield
    gpu_names.cache_clear()


@pytest.fixture
def gpu_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes this a CUDA build of torch, whose other process runs `shell`."""

    def install(shell: str) -> None:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{shell}\n")
        python.chmod(0o755)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(sys, "executable", str(python))
        for name in ("is_available", "device_count", "get_device_name", "mem_get_info"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("asked in this process"))

    return install


def test_another_process_looks_at_the_gpus(gpu_host: Callable[[str], None]) -> None:
    gpu_host("printf 'NVIDIA H200\\t7\\t9\\nNVIDIA H200\\t8\\t9\\n'")
    assert device_name() == "2x NVIDIA H200"
    assert torch_device("auto") == "cuda" and torch_device("cpu") == "cpu"
    assert find_gpus() == [Gpu("NVIDIA H200", 7, 9), Gpu("NVIDIA H200", 8, 9)]


def test_a_cuda_build_without_gpus_names_the_processor(gpu_host: Callable[[str], None]) -> None:
    gpu_host("true")
    assert device_name().endswith(" cores")
    assert torch_device("auto") == "cpu"


def test_a_driver_that_fails_is_one_line(gpu_host: Callable[[str], None]) -> None:
    gpu_host("printf 'Traceback\\nRuntimeError: no driver\\n' >&2; exit 1")
    with pytest.raises(GraftError, match=r"^torch cannot use the GPUs \(RuntimeError: no driver"):
        device_name()


def test_the_cpu_build_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked"))
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
