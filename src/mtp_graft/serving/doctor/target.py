"""What a checkpoint is to be served with: vLLM, hardware, ranks and context."""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from packaging.version import Version

from mtp_graft.errors import GraftError
from mtp_graft.serving.command import (
    PLUGIN_NAME,
    Platform,
    installed_vllm,
    read_config,
    vllm_elsewhere,
)
from mtp_graft.serving.topology import (
    CPU,
    Hardware,
    find_gpus,
    most_ranks,
    named_hardware,
)

_PLUGIN_GROUP = "vllm.general_plugins"


@dataclass(frozen=True)
class Target:
    """None stands for what is not known; checks that need it are left out, and said to be."""

    vllm: Version | None
    platform: Platform | None
    hardware: Hardware | None
    tp: int = 1
    max_model_len: int | None = None
    installed: bool = False  # `vllm` is the one of this environment
    plugin_found: bool = True
    plugins_allowed: str | None = None  # VLLM_PLUGINS
    unknown_because: str | None = None  # why `hardware` is None though there should be some


def find_target(
    gpu: str | None = None,
    count: int | None = None,
    tp: int | None = None,
    max_model_len: int | None = None,
    checkpoint: Path | None = None,
) -> Target:
    """Return what the options name, and for the rest what is installed and present.

    `gpu` may be `cpu`; where the installed vLLM is not for it, the one that was tried on it counts.
    `tp` defaults to the ranks that `serve` takes for the checkpoint, or, where that cannot be told,
    to the largest power of two of GPUs. Raises UsageError for a GPU that is none.
    """
    vllm = here = installed_vllm()
    platform: Platform | None
    hardware: Hardware | None
    unknown = None
    if gpu is not None:
        hardware = named_hardware(gpu, count or tp or 1)
        platform = hardware.platform
        if here is None or here.platform != platform:
            vllm = vllm_elsewhere(platform)
    else:
        platform = here.platform if here else ("cuda" if shutil.which("nvidia-smi") else None)
        try:
            hardware = _present(platform)
        except GraftError as error:
            hardware, unknown = None, str(error)
    return Target(
        vllm.version if vllm else None,
        platform,
        hardware,
        tp or _default_ranks(checkpoint, hardware.num_gpus if hardware else 0),
        max_model_len,
        installed=vllm is not None and vllm is here,
        plugin_found=any(p.name == PLUGIN_NAME for p in entry_points(group=_PLUGIN_GROUP)),
        plugins_allowed=os.environ.get("VLLM_PLUGINS"),
        unknown_because=unknown,
    )


def _default_ranks(checkpoint: Path | None, num_gpus: int) -> int:
    if checkpoint is not None:
        with suppress(GraftError):  # a config that is damaged has findings of its own
            return most_ranks(read_config(checkpoint), num_gpus)
    return 1 << max(num_gpus.bit_length() - 1, 0)


def _present(platform: Platform | None) -> Hardware | None:
    if platform == "cpu":
        return CPU
    return find_gpus() if platform == "cuda" and shutil.which("nvidia-smi") else None
