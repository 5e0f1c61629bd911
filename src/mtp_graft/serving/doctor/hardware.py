"""Checks of vLLM and the hardware: versions, ranks, memory, and known issues of vLLM."""

import os
import re
from collections.abc import Callable, Iterator, Mapping

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mtp_graft import SUPPORTED_VLLM, TRIED_VLLM
from mtp_graft.quant import mxfp4
from mtp_graft.serving.command import PLUGIN_NAME, is_supported
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.doctor.findings import KINDS, Finding, finding
from mtp_graft.serving.doctor.target import Target
from mtp_graft.serving.memory import (
    RESERVE_BYTES,
    UTILIZATION,
    kv_cache_bytes,
    largest_context,
    weights_bytes,
)
from mtp_graft.serving.profiles import MAX_NUM_BATCHED_TOKENS

_GIB = 2**30
#: Of steps being computed: with asynchronous scheduling there are two.
TOKENS_IN_FLIGHT = 2 * MAX_NUM_BATCHED_TOKENS


def vllm(_checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find a vLLM that is missing, unsupported or untried, or that will not load the plugin."""
    if target.vllm is None:
        yield finding("vllm-unknown", "this Python environment", "no vLLM", f"vllm{SUPPORTED_VLLM}")
    elif not is_supported(target.vllm):
        yield finding("vllm-unsupported", "vLLM", target.vllm, SUPPORTED_VLLM)
    elif target.platform is not None:
        tried = Version(TRIED_VLLM[target.platform])
        if target.vllm.release[:2] > tried.release[:2]:  # patches do not count
            expected = f"{tried}, the newest that was tried"
            yield finding("vllm-untried", "vLLM", target.vllm, expected)
    if not target.installed:
        return  # another environment will serve
    expected, allowed = f"{PLUGIN_NAME} among them", target.plugins_allowed
    if not target.plugin_found:
        where = "entry points of vllm.general_plugins"
        yield finding("plugin-missing", where, f"no {PLUGIN_NAME}", expected)
    elif allowed is not None and PLUGIN_NAME not in allowed.split(","):
        yield finding("plugin-missing", "VLLM_PLUGINS", repr(allowed), expected, "warning")


def ranks(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find GPUs that are unknown or too few, and what the ranks cannot share evenly."""
    hardware, tp = target.hardware, target.tp
    if target.unknown_because is not None:
        where, expected = "this machine", "GPUs of one kind that nvidia-smi tells of"
        yield finding("gpus-unknown", where, target.unknown_because, expected)
    if hardware is not None and hardware.gpu is not None and tp > hardware.num_gpus:
        found = f"{tp} ranks on {hardware.num_gpus} GPUs"
        yield finding("gpu-count", "--tp", found, f"at most {hardware.num_gpus} ranks")
    for key in ("num_attention_heads", "o_groups"):
        if (number := checkpoint.config[key]) % tp:
            where, found = f"config.json: {key}", f"{number} on {tp} ranks"
            yield finding("tp-heads", where, found, f"a number of ranks that divides {number}")
            break
    formats, inner = checkpoint.formats, checkpoint.config["moe_intermediate_size"]
    int4 = checkpoint.group_size if "int4" in formats else 1
    group = max(int4, mxfp4.GROUP if "mxfp4" in formats else 1)
    if inner % (tp * group):
        where, found = "config.json: moe_intermediate_size", f"{inner} on {tp} ranks"
        yield finding("tp-groups", where, found, f"a multiple of {group} inputs on every rank")


def memory(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Estimate weights and KV cache against the memory, and the context against the positions."""
    hardware, asked = target.hardware, target.max_model_len
    positions = checkpoint.config.get("max_position_embeddings") or asked or 0
    if asked is not None and asked > positions:
        expected = f"at most {positions}, the model's max_position_embeddings"
        yield finding("context-positions", "--max-model-len", f"{asked} tokens", expected)
    if hardware is None or checkpoint.unreadable:
        return
    if hardware.gpu is None:
        limit, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
        weights, reserve = weights_bytes(checkpoint.tensors, 1, decoded=True), 0
    else:
        share = min(UTILIZATION, hardware.most_utilization)
        limit, where = int(share * hardware.memory_bytes), f"{share:.0%} of each of {hardware}"
        weights, reserve = weights_bytes(checkpoint.tensors, target.tp), RESERVE_BYTES
    left = limit - weights - reserve
    estimate = (
        f"weights {weights / _GIB:.1f} GiB on each of {target.tp} ranks and {reserve / _GIB:.0f} "
        f"GiB for all else, of {limit / _GIB:.1f} GiB"
    )
    if left <= 0:
        yield finding("memory-weights", where, estimate, "room for the KV cache too")
    elif hardware.gpu is not None and len(checkpoint.ratios) >= checkpoint.num_layers:
        yield _context(checkpoint, min(asked or positions, positions), left, where, estimate, asked)


def _context(
    checkpoint: Checkpoint, wanted: int, left: int, where: str, estimate: str, asked: int | None
) -> Finding:
    most = largest_context(checkpoint.config, left, TOKENS_IN_FLIGHT)
    needed = kv_cache_bytes(checkpoint.config, wanted, TOKENS_IN_FLIGHT) / _GIB
    found = f"{wanted} tokens take {needed:.1f} GiB of KV cache; {left / _GIB:.1f} are left"
    if most >= wanted:
        return finding("memory", where, f"{estimate}; {found}", f"at most {most} tokens")
    expected = f"at most --max-model-len {most // 256 * 256}: {estimate}"
    return finding("memory-context", where, found, expected, None if asked else "warning")


# Known issues


def _has_pcie_only(target: Target) -> bool:
    return target.hardware is not None and target.hardware.link == "pcie"


def _has_one_group_a_rank(checkpoint: Checkpoint, target: Target) -> bool:
    """Say whether a rank has one group of INT4 scales an expert, in the layout of Marlin."""
    gpu = (target.hardware and target.hardware.gpu) or ""
    if target.platform != "cuda" or re.search(r"\bG?H[12]00\b", gpu):
        return False
    inner, hidden = (checkpoint.config[k] for k in ("moe_intermediate_size", "hidden_size"))
    is_one = inner // target.tp <= checkpoint.group_size < hidden
    return is_one and "int4" in checkpoint.formats


#: Whom the known issues of findings.toml meet.
ISSUES: Mapping[str, Callable[[Checkpoint, Target], bool]] = {
    "vllm-51513": lambda _checkpoint, target: target.tp == 2 and _has_pcie_only(target),
    "vllm-42063": lambda _checkpoint, target: target.tp >= 4 and _has_pcie_only(target),
    "vllm-50196": _has_one_group_a_rank,
    "vllm-46307": lambda _checkpoint, target: (
        target.hardware is not None and target.hardware.unified_memory
    ),
    "piecewise-graphs": lambda _checkpoint, target: target.platform == "cuda",
}


def known_issues(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find the known issues that meet this checkpoint on this target."""
    for id_, applies in ISSUES.items():
        affects = SpecifierSet(KINDS[id_].affects or "")
        if (target.vllm is None or target.vllm in affects) and applies(checkpoint, target):
            where = f"vLLM {target.vllm or '(any)'} on {target.hardware or 'unknown hardware'}"
            yield finding(id_, where, KINDS[id_].what, f"a vLLM other than {affects}, or not that")
