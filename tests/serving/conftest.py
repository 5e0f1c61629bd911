"""A stand-in vLLM installation and checkpoints that have names but next to no bytes."""

import json
import os
import stat
import sys
import time
from collections.abc import Callable
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.serving import command

FAKE_VLLM = Path(__file__).with_name("fake_vllm.py")
BASE_TENSORS = ("embed.weight", "layers.0.attn.wq_a.weight")
HEAD_TENSORS = ("mtp.0.e_proj.weight",)


def install(site: Path, name: str = "vllm", version: str = "0.32.0+cpu") -> Path:
    """Make `site` look as if pip had installed vLLM there; return its `vllm` script."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("../bin/vllm,,\n")
    script = site.parent / "bin" / "vllm"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE_VLLM}" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def only_from(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing but `site` count as installed."""

    def distribution(name: str) -> Distribution:
        for dist in Distribution.discover(name=name, path=[str(site)]):
            return dist
        raise PackageNotFoundError(name)

    monkeypatch.setattr(command, "distribution", distribution)


def install_nvidia_smi(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, memory_mib: str, link: str
) -> None:
    """Put an `nvidia-smi` into `folder`, first on PATH, that tells of two GPUs."""
    script = folder / "nvidia-smi"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = topo ]; then printf "GPU0 X {link}\\nGPU1 {link} X\\n"\n'
        f'else printf "{gpu}, {memory_mib}\\n{gpu}, {memory_mib}\\n"; fi\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages folder with the stand-in, a CPU build of vLLM 0.32.0."""
    site = tmp_path / "env" / "site-packages"
    install(site)
    return site


@pytest.fixture
def vllm(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in's `vllm` script, the only vLLM that this process and its children see."""
    only_from(site, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(site))
    for name in ("OMP_NUM_THREADS", "FAKE_VLLM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return site.parent / "bin" / "vllm"


@pytest.fixture
def fake(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set how the stand-in behaves."""

    def configure(**settings: Any) -> None:
        monkeypatch.setenv("FAKE_VLLM", json.dumps(settings))

    return configure


def write_checkpoint(folder: Path, tensors: tuple[str, ...]) -> Path:
    folder.mkdir(parents=True)
    config = {"model_type": "deepseek_v4", "hc_mult": 2, "hidden_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint without a head."""
    return write_checkpoint(tmp_path / "base", BASE_TENSORS)


@pytest.fixture
def grafted(tmp_path: Path) -> Path:
    """A checkpoint with a head."""
    return write_checkpoint(tmp_path / "grafted", BASE_TENSORS + HEAD_TENSORS)


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """Two prompts of different length."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "a", "text": "ab"}\n\n{"id": "b", "text": "hello"}\n')
    return file


def read_record(file: Path, timeout_s: float = 20.0) -> dict[str, Any]:
    """Wait for the stand-in's record of its arguments, environment and process ids."""
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        assert time.monotonic() < deadline, f"{file}: the stand-in never started"
        time.sleep(0.02)
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_gone(pids: list[int], timeout_s: float = 10.0) -> list[int]:
    """Return the processes that are still there after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def command_environment(site: Path, **settings: Any) -> dict[str, str]:
    """Return the environment for a `mtp-graft` subprocess that finds the stand-in."""
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "FAKE_VLLM": json.dumps(settings)}
