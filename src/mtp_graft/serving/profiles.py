"""The serving profiles, and every flag and variable of `vllm serve` with its reason.

They are data, in profiles.toml; `plan.py` fits a profile to the hardware.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Profile:
    """How long and how many sequences may be, and the share of a GPU's memory for all of vLLM."""

    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    why: str


#: Flags and environment variables: the value (True: a flag without one), and why it is there.
Settings = Mapping[str, tuple[str | bool, str]]

_DATA = tomllib.loads(files(__package__).joinpath("profiles.toml").read_text(encoding="utf-8"))
PROFILES: Mapping[str, Profile] = {n: Profile(**given) for n, given in _DATA["profiles"].items()}
#: GPUs that options can name, and what `topology.Hardware` has of them.
GPUS: Mapping[str, Mapping[str, Any]] = _DATA["gpus"]
ALWAYS: Settings = _DATA["always"]
ON_GPUS: Settings = _DATA["on_gpus"]
#: Where several GPUs of one host have no NVLink between them.
ON_PCIE: Settings = _DATA["on_pcie"]
#: Why a command has a flag or a variable.
REASONS: Mapping[str, str] = {
    **{name: why for group in (ALWAYS, ON_GPUS, ON_PCIE) for name, (_, why) in group.items()},
    **_DATA["reasons"],
}

#: The most that a GPU may take of a memory that it shares with the CPU.
UNIFIED_MEMORY_UTILIZATION = 0.85
#: Of `auto`, the most that Acti tried: vLLM lets those wait that the cache has no room for.
MAX_NUM_SEQS = 8
#: The step size of Acti's 524k command. Its table gives none for the other profiles.
MAX_NUM_BATCHED_TOKENS = 8192
#: So that clients of Acti's server find their model.
SERVED_MODEL_NAMES: tuple[str, ...] = tuple(_DATA["served_model_names"])


def split(settings: Settings) -> tuple[dict[str, str | bool], dict[str, str]]:
    """Return the values of the flags and of the environment variables."""
    flags = {name: value for name, (value, _) in settings.items() if name.startswith("--")}
    return flags, {name: str(value) for name, (value, _) in settings.items() if name not in flags}
