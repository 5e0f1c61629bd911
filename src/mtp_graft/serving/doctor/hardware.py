"""What a checkpoint is to be served with, and its checks: vLLM, ranks, memory, known issues."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mtp_graft import SUPPORTED_VLLM, TRIED_VLLM
from mtp_graft.checkpoint.quantization_config import INTEGERS
from mtp_graft.errors import GraftError
from mtp_graft.quant import MXFP4_GROUP
from mtp_graft.serving import command, topology
from mtp_graft.serving.command import PLUGIN_NAME, Platform
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.doctor.findings import KINDS, Finding, Severity, finding
from mtp_graft.serving.memory import UTILIZATION, measure_room
from mtp_graft.serving.topology import Hardware


@dataclass(frozen=True)
class Target:
    """None stands for what is not known; checks that need it are left out, and said to be."""

    vllm: Version | None
    platform: Platform | None
    hardware: Hardware | None
    tp: int = 1
    max_model_len: int | None = None
    findings: tuple[Finding, ...] = ()  # of whatever the checkpoint is


def find_target(
    gpu: str | None = None,
    count: int | None = None,
    tp: int | None = None,
    max_model_len: int | None = None,
    checkpoint: Path | None = None,
    version: str | None = None,
) -> Target:
    """Return what the options name, and for the rest what is installed and present.

    `gpu` may be `cpu`; where the installed vLLM is not for it, the one that was tried on it counts,
    unless `version` is given.
    `tp` defaults to the ranks of `serve`, or to the GPUs. Raises UsageError for a GPU that is none.
    """
    vllm = here = command.installed_vllm()
    hardware: Hardware | None = None
    findings: list[Finding] = []
    if gpu is not None:
        hardware = topology.named_hardware(gpu, count or tp or 1)
        if here is None or here.platform != hardware.platform:
            vllm = command.vllm_elsewhere(hardware.platform)
    else:
        try:
            hardware = topology.hardware_for(here.platform if here else "cuda")
        except GraftError as error:
            kind = "gpus-hidden" if topology.visible_devices() == [] else "gpus-unknown"
            if here is not None:
                findings.append(finding(kind, "this machine", error, "GPUs of one kind"))
    if version is not None:
        of = hardware or here
        vllm = command.vllm_elsewhere(of.platform if of else "cuda", version)
    findings += _plugin_findings() if vllm and vllm is here else ()
    num_gpus = hardware.num_gpus if hardware else 0
    ranks = tp or 1 << max(num_gpus.bit_length() - 1, 0)
    if tp is None and checkpoint is not None:
        with suppress(GraftError):  # a config that is damaged has findings of its own
            ranks = topology.most_ranks(command.read_config(checkpoint), num_gpus)
    platform = hardware.platform if hardware else vllm.platform if vllm else None
    said = vllm.version if vllm else None
    return Target(said, platform, hardware, ranks, max_model_len, tuple(findings))


def _plugin_findings() -> Iterator[Finding]:
    group, allowed = "vllm.general_plugins", os.environ.get("VLLM_PLUGINS")
    expected = f"{PLUGIN_NAME} among them"
    if not any(plugin.name == PLUGIN_NAME for plugin in entry_points(group=group)):
        yield finding("plugin-missing", f"entry points of {group}", f"no {PLUGIN_NAME}", expected)
    elif allowed is not None and PLUGIN_NAME not in allowed.split(","):  # `serve` sets it
        yield finding("plugin-missing", "VLLM_PLUGINS", repr(allowed), expected, "warning")


# Checks


def vllm(_checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find a vLLM that is missing, unsupported or untried."""
    if target.vllm is None:
        yield finding("vllm-unknown", "this Python environment", "no vLLM", f"vllm{SUPPORTED_VLLM}")
    elif target.vllm not in command.SUPPORTED:
        yield finding("vllm-unsupported", "vLLM", target.vllm, SUPPORTED_VLLM)
    elif target.platform is not None:
        tried = Version(TRIED_VLLM[target.platform])
        if target.vllm.release[:2] > tried.release[:2]:  # patches do not count
            yield finding("vllm-untried", "vLLM", target.vllm, f"{tried}, the newest tried")


def ranks(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find GPUs that are too few, and what the ranks cannot share evenly."""
    hardware, tp = target.hardware, target.tp
    if hardware is not None and hardware.gpu is not None and tp > hardware.num_gpus:
        found = f"{tp} ranks on {hardware.num_gpus} GPUs"
        yield finding("gpu-count", "--tp", found, f"at most {hardware.num_gpus} ranks")
    groups = {**dict.fromkeys(INTEGERS, checkpoint.group_size), "mxfp4": MXFP4_GROUP}
    group = max((groups.get(str(each), 1) for each in checkpoint.formats.values()), default=1)
    for key, unit in topology.undivided(checkpoint.config, tp, group).items():
        kind, found = "tp-heads" if unit == 1 else "tp-groups", checkpoint.config[key]
        where, found = f"config.json: {key}", f"{found} on {tp} ranks"
        yield finding(kind, where, found, f"a multiple of {tp * unit}")


def memory(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Estimate weights and KV cache against the memory, and the context against the positions."""
    hardware, asked, config = target.hardware, target.max_model_len, checkpoint.config
    positions = config.get("max_position_embeddings") or asked or 0
    if asked is not None and asked > positions:
        expected = f"at most {positions}, the model's max_position_embeddings"
        yield finding("context-positions", "--max-model-len", f"{asked} tokens", expected)
    if hardware is None or checkpoint.unreadable:
        return
    share = None if hardware.gpu is None else min(UTILIZATION, hardware.most_utilization)
    where = "this machine" if share is None else f"{share:.0%} of each of {hardware}"
    room = measure_room(checkpoint.tensors, config, hardware, target.tp)
    if room.cache(share) <= 0:
        found = f"{room.weights / 2**30:.1f} GiB of weights on each of {target.tp} ranks"
        yield finding("memory-weights", where, found, "room for the KV cache too")
    elif share is not None and len(checkpoint.ratios) >= checkpoint.num_layers:
        most, wanted = room.largest_context(share), min(asked or positions, positions)
        kind = "memory" if most >= wanted else "memory-context"
        severity: Severity | None = "warning" if most < wanted and asked is None else None
        found, expected = room.estimate(wanted, share), f"at most --max-model-len {most}"
        yield finding(kind, where, found, expected, severity)


# Known issues


def known_issues(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find the known issues of findings.toml that meet this checkpoint on this target."""
    hardware, on_cuda = target.hardware, target.platform == "cuda"
    is_pcie_only = hardware is not None and hardware.is_pcie_only
    sm = hardware.capability if hardware else (0, 0)
    has_marlin = on_cuda and sm != (9, 0) and "int4" in checkpoint.formats.values()
    inner, hidden = (checkpoint.config[k] for k in ("moe_intermediate_size", "hidden_size"))
    has_one_group = inner // target.tp <= checkpoint.group_size < hidden
    issues = {
        "gpu-capability": sm[0] not in topology.ATTENTION,
        "vllm-51513": target.tp == 2 and is_pcie_only,
        "vllm-42063": target.tp >= 4 and is_pcie_only,
        "vllm-50196": has_marlin and has_one_group,
        **dict.fromkeys(("vllm-40923", "vllm-36889"), has_marlin and sm[0] == 12),
        "vllm-51593": checkpoint.has_head and sm[0] == 12,
        "vllm-40969": sm == (12, 1),
        "vllm-51970": sm == (9, 0),
        "vllm-46307": hardware is not None and hardware.unified_memory,
        "piecewise-graphs": on_cuda,
    }
    version = target.vllm or Version(TRIED_VLLM["cuda"])
    for id_ in filter(issues.get, issues):
        if version in (affects := SpecifierSet(KINDS[id_].affects)):
            where = f"vLLM {target.vllm or '(any)'} on {hardware or 'unknown hardware'}"
            expected = f"another setup, or a vLLM that is not {affects}"
            yield finding(id_, where, KINDS[id_].what, expected)
