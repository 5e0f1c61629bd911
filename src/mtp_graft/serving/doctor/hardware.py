"""Checks of the hardware and of how the ranks divide the model."""

import os
from collections.abc import Iterator

from mtp_graft.serving.doctor.findings import Finding
from mtp_graft.serving.doctor.formats import format_of
from mtp_graft.serving.doctor.survey import Survey
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


def unknown_gpus(_survey: Survey, target: Target) -> Iterator[Finding]:
    """Find GPUs that could not be asked what they are."""
    if target.unknown_because is not None:
        yield Finding(
            "gpus-unknown",
            "warning",
            "this machine",
            target.unknown_because,
            "GPUs of one kind that nvidia-smi tells of",
            "ranks, memory and links were not checked, and vLLM may not find the GPUs either",
            "--gpu NAME --count N (or --gpu cpu) for what will serve",
        )


def gpu_count(_survey: Survey, target: Target) -> Iterator[Finding]:
    """Find more ranks than GPUs."""
    hardware = target.hardware
    if hardware is not None and hardware.gpu is not None and target.tp > hardware.num_gpus:
        yield Finding(
            "gpu-count",
            "error",
            "--tp",
            f"{target.tp} ranks on {hardware.num_gpus} GPUs",
            "a GPU for each rank",
            "vLLM stops before it loads anything: the world size is larger than the number of GPUs",
            f"--tp {hardware.num_gpus}, or more GPUs",
        )


def head_division(survey: Survey, target: Target) -> Iterator[Finding]:
    """Find attention heads or output groups that the ranks cannot share evenly."""
    for key in ("num_attention_heads", "o_groups"):
        number = survey.config.get(key)
        if isinstance(number, int) and number % target.tp:
            yield Finding(
                "tp-heads",
                "error",
                f"config.json: {key}",
                f"{number} on {target.tp} ranks",
                f"a tensor parallel size that divides {number}",
                "vLLM stops with an assertion or a shape error while it builds the attention",
                "choose a --tp that divides both num_attention_heads and o_groups",
            )
            return


def group_division(survey: Survey, target: Target) -> Iterator[Finding]:
    """Find groups of INT4 scales that a rank's share of an expert would cut."""
    inner = survey.config.get("moe_intermediate_size")
    formats = {format_of(parts) for parts in survey.stems.values()}
    group = survey.group_size if "int4" in formats else 32 if "mxfp4" in formats else 1
    if isinstance(inner, int) and inner % (target.tp * group):
        yield Finding(
            "tp-groups",
            "error",
            "config.json: moe_intermediate_size",
            f"{inner} on {target.tp} ranks is {inner / target.tp:g} each",
            f"a multiple of the group of {group} inputs on every rank",
            "w2's scales belong to groups that a rank has in part; vLLM stops with a ValueError",
            f"a smaller --tp: at most {max(1, inner // group)}, and one that divides",
        )


def positions(survey: Survey, target: Target) -> Iterator[Finding]:
    """Find a context that is longer than the model has positions for."""
    limit, wanted = survey.config.get("max_position_embeddings"), target.max_model_len
    if isinstance(limit, int) and wanted is not None and wanted > limit:
        yield Finding(
            "context-positions",
            "error",
            "--max-model-len",
            f"{wanted} tokens",
            f"at most {limit}, the model's max_position_embeddings",
            "vLLM stops with a ValueError before it loads anything",
            f"--max-model-len {limit}; more GPUs or memory do not help",
        )


def memory(survey: Survey, target: Target) -> Iterator[Finding]:
    """Estimate weights and KV cache on each GPU, or weights on a CPU, against the memory."""
    hardware = target.hardware
    if hardware is None or survey.unreadable:
        return
    if hardware.gpu is None:
        yield from _host_memory(survey)
        return
    weights = weights_bytes(survey.tensors, target.tp)
    share = min(UTILIZATION, hardware.most_utilization)
    limit = int(share * hardware.memory_bytes)
    left = limit - weights - RESERVE_BYTES
    estimate = (
        f"weights {weights / _GIB:.1f} GiB and {RESERVE_BYTES / _GIB:.0f} GiB for all else of "
        f"{limit / _GIB:.1f} GiB ({share:.0%} of {hardware}) on each of {target.tp} ranks"
    )
    if left <= 0:
        yield Finding(
            "memory-weights",
            "error",
            "memory of a GPU (an estimate, docs/doctor.md)",
            estimate,
            "room for the weights and some for the KV cache",
            "vLLM loads for minutes and then stops: 'CUDA out of memory', or no memory left for "
            "cache blocks",
            "more GPUs with a larger --tp, or larger GPUs",
        )
        return
    if len(survey.ratios) < survey.num_layers:
        return  # the cache cannot be estimated; the list has a finding of its own
    yield from _context(survey, target, left, estimate)


def _host_memory(survey: Survey) -> Iterator[Finding]:
    needed = weights_bytes(survey.tensors, 1, decoded=True)
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        yield Finding(
            "memory-weights",
            "error",
            "memory of this machine",
            f"weights {needed / _GIB:.1f} GiB decoded, of {present / _GIB:.1f} GiB",
            "room for the decoded weights",
            "on a CPU the plugin decodes experts to float32 and FP8 linears to BF16 after it has "
            "loaded them; the machine runs out of memory on the way",
            "a CPU is for small models such as models/tiny-dsv4: serve this one on GPUs",
        )


def _context(survey: Survey, target: Target, left: int, estimate: str) -> Iterator[Finding]:
    most = largest_context(survey.config, left, 1, TOKENS_IN_FLIGHT)
    limit = int(survey.config.get("max_position_embeddings", 0))
    wanted = min(target.max_model_len or limit, limit)
    needed = kv_cache_bytes(survey.config, wanted, TOKENS_IN_FLIGHT)
    if most < wanted:
        yield Finding(
            "memory-context",
            "error" if target.max_model_len else "warning",
            "--max-model-len (an estimate, docs/doctor.md)",
            f"{wanted} tokens need {needed / _GIB:.1f} GiB of KV cache; {left / _GIB:.1f} are left",
            f"at most {most // 256 * 256} tokens: {estimate}",
            "vLLM loads all weights, then stops with a ValueError that says how much KV cache one "
            "request of that length needs"
            + ("" if target.max_model_len else "; without --max-model-len it takes the model's"),
            f"--max-model-len {most // 256 * 256}, or more GPUs",
        )
    else:
        yield Finding(
            "memory",
            "note",
            "memory of a GPU (an estimate, docs/doctor.md)",
            f"{estimate}; {left / _GIB:.1f} GiB left for the KV cache",
            f"a context of {wanted} tokens takes {needed / _GIB:.1f} GiB of it",
            "this is an estimate from headers; vLLM measures when it starts",
            f"nothing to do; the largest context by this estimate is {most} tokens",
        )
