"""Fits a serving profile to a checkpoint and the hardware at hand, and says how."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mtp_graft.dsv4.config import check_dimensions
from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving.command import (
    BLOCK_SIZE,
    DEFAULT_K,
    DEFAULT_SAMPLING,
    InstalledVllm,
    Platform,
    ServeOptions,
    num_speculative_tokens,
    read_config,
)
from mtp_graft.serving.profiles import (
    ACTI,
    ACTI_HOST,
    DIFFERENCES_FROM_ACTI,
    GPU_ENVIRONMENT,
    MAX_NUM_BATCHED_TOKENS,
    MOST_SEQUENCES,
    PCIE_ENVIRONMENT,
    PCIE_FLAGS,
    PROFILES,
    SERVED_MODEL_NAMES,
    UNIFIED_MEMORY_WHY,
    Profile,
    Setting,
)
from mtp_graft.serving.ranks import most_ranks, undivided
from mtp_graft.serving.room import Room, measure_room
from mtp_graft.serving.topology import Hardware

AUTO = "auto"
NO_DRAFTING = "no drafting: the checkpoint has no head, or 0 tokens were asked for"


@dataclass(frozen=True)
class Node:
    """This machine's place among several that serve together."""

    rank: int = 0
    master_address: str | None = None  # of the machine with rank 0


@dataclass(frozen=True)
class Plan:
    """Options with everything decided that the profile decides, and what was decided and why."""

    profile: str
    hardware: Hardware
    options: ServeOptions
    notes: tuple[str, ...]


def make_plan(
    options: ServeOptions,
    profile_name: str,
    hardware: Hardware,
    vllm: InstalledVllm,
    node: Node | None = None,
) -> Plan:
    """Return how to serve `options.checkpoint` with a profile; what `options` set stays.

    Raises UsageError for an unknown profile. Raises GraftError for weights that do not fit, a
    context that does not (without one, `auto` takes the largest that does) or that the model has
    no positions for, ranks that hardware, model or vLLM do not allow, and several machines without
    the address of the first.
    """
    notes: list[str] = []
    config = read_config(options.checkpoint)
    check_dimensions(config, options.checkpoint / "config.json")
    tp = _tensor_parallel_size(options, config, hardware, notes)
    options = replace(options, tensor_parallel_size=tp)
    room = measure_room(
        *(options.checkpoint, config, hardware, tp),
        # Twice: with asynchronous scheduling the next step is prepared while one is computed.
        tokens_in_flight=2 * (options.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS),
        cache_gib=options.kv_cache_gib,
    )
    if options.draft_lm_head_quantization is not None:  # at most a byte a weight
        copy = config["vocab_size"] * config["hidden_size"] // tp
        room = replace(room, weights_bytes=room.weights_bytes + copy)
    name, profile = _choose(profile_name, options, room)
    notes += _explained(name, profile, options, room)
    options, adapted = adapt(_filled(options, profile, room), hardware, vllm)
    notes += adapted
    flags = _node_flags(hardware, node or Node(), notes)
    options = replace(options, extra_args=(*flags, *options.extra_args))
    if options.host != ACTI_HOST:
        notes.append(
            f"listens on {options.host}; Acti on {ACTI_HOST} (--host, and then an --api-key)"
        )
    return Plan(name, hardware, options, (*notes, *DIFFERENCES_FROM_ACTI))


def _tensor_parallel_size(
    options: ServeOptions,
    config: dict[str, Any],
    hardware: Hardware,
    notes: list[str],
) -> int:
    """Return the ranks asked for, or the most that hardware and model allow.

    Raises GraftError if those asked for are more than that, or do not divide the model.
    """
    wanted = options.tensor_parallel_size
    if wanted is not None:
        _check_ranks(wanted, config, hardware)
        return wanted
    most = most_ranks(config, hardware.num_gpus)
    if most < hardware.num_gpus:
        notes.append(f"{hardware.num_gpus - most} of {hardware.num_gpus} GPUs stay unused")
    return most


def _check_ranks(wanted: int, config: dict[str, Any], hardware: Hardware) -> None:
    """Raise GraftError for a number of ranks that would not start."""
    flag = f"--tensor-parallel-size {wanted}"
    if hardware.gpu is not None and wanted > hardware.num_gpus:
        raise GraftError(f"{flag} on {hardware}; expected at most {hardware.num_gpus}")
    uneven = wanted > 1 and undivided(config, wanted)
    if uneven:
        raise GraftError(
            f"{flag}: config.json has {uneven}, which the ranks cannot share evenly; "
            "expected a number that divides it"
        )


def _choose(wanted: str, options: ServeOptions, room: Room) -> tuple[str, Profile]:
    """Return the profile of that name as it is to be served; for `auto` the one that fits best."""
    if wanted == AUTO:
        return _choose_automatically(options, room)
    if wanted not in PROFILES:
        names = ", ".join((*PROFILES, AUTO))
        raise UsageError(f"--profile {wanted}: unknown; expected one of {names}, or none")
    profile = _with_options(PROFILES[wanted], options, room)
    if profile.max_model_len > room.largest_context(profile.gpu_memory_utilization):
        raise _too_long(wanted, profile, options, room)
    return wanted, profile


def _too_long(name: str, profile: Profile, options: ServeOptions, room: Room) -> GraftError:
    """Return the error of a context that the model or the memory has no room for."""
    length, utilization = profile.max_model_len, profile.gpu_memory_utilization
    largest = room.largest_context(utilization)
    cures = [f"--max-model-len {largest}"] if largest else []
    if options.max_model_len is None:
        asked = f"--profile {name} has a context of {length} tokens"
        cures = [f"--profile {AUTO}", *cures]
    else:
        asked = f"--max-model-len {length}"
    if length > room.model_limit and largest:
        why = f"the model has {room.model_limit} positions"
    else:
        why = (
            f"on {room.hardware} there is room for {largest} tokens "
            f"({room.describe(utilization, length)})"
        )
        cures.append("more ranks" if room.cache_bytes is None else "a larger --kv-cache-gib")
    return GraftError(f"{options.checkpoint}: {asked}; {why}; take {', or '.join(cures)}")


def _choose_automatically(options: ServeOptions, room: Room) -> tuple[str, Profile]:
    """Return the profile with the longest context that fits, for as many sequences as fit.

    Where none fits whole, that is the one that gets furthest, its context cut to what there is;
    one that was asked for is not cut.
    """
    profiles = {name: _with_options(profile, options, room) for name, profile in PROFILES.items()}
    largest = {
        name: room.largest_context(profile.gpu_memory_utilization)
        for name, profile in profiles.items()
    }
    whole = [name for name, profile in profiles.items() if profile.max_model_len <= largest[name]]
    if whole:
        name = max(whole, key=lambda name: PROFILES[name].max_model_len)
        profile = profiles[name]
    else:
        name = max(largest, key=lambda name: largest[name])
        if options.max_model_len is not None:
            raise _too_long(name, profiles[name], options, room)
        profile = replace(profiles[name], max_model_len=largest[name])
    utilization = profile.gpu_memory_utilization
    if profile.max_model_len == 0:
        cure = "take more GPUs, or larger ones"
        if utilization == options.gpu_memory_utilization:
            cure = f"take a larger --gpu-memory-utilization than {utilization}, or more GPUs"
        raise GraftError(
            f"{options.checkpoint}: no room for a context on {room.hardware} "
            f"({room.describe(utilization, BLOCK_SIZE)}); {cure}"
        )
    if options.max_num_seqs is None and room.hardware.gpu is not None:
        num_seqs = room.num_sequences(utilization, profile.max_model_len, MOST_SEQUENCES)
        profile = replace(profile, max_num_seqs=max(num_seqs, 1))
    return name, profile


def _with_options(profile: Profile, options: ServeOptions, room: Room) -> Profile:
    """Return the profile with what the options say, and the memory it may take."""
    return replace(
        profile,
        max_model_len=options.max_model_len or profile.max_model_len,
        max_num_seqs=options.max_num_seqs or profile.max_num_seqs,
        gpu_memory_utilization=options.gpu_memory_utilization
        or min(profile.gpu_memory_utilization, room.hardware.most_utilization),
    )


def _explained(name: str, profile: Profile, options: ServeOptions, room: Room) -> Iterator[str]:
    """Say which profile it is, where it was changed and why, and what memory it takes."""
    yield f"profile {name}: {profile.why} ({profile.source})"
    for flag, value, default, why in _compared(profile, PROFILES[name], options, room):
        if value != default:
            yield f"{flag} {value}, the profile has {default}: {why}"
    if room.hardware.gpu is None:
        yield (
            "--gpu-memory-utilization left out: on a CPU the KV cache is given in bytes; "
            "--max-num-batched-tokens as well, unless a step has to hold a whole prompt "
            "(docs/engine.md)"
        )
    yield room.describe(profile.gpu_memory_utilization, profile.max_model_len)
    shape = profile.max_model_len, profile.max_num_seqs
    num_seqs = room.num_sequences(profile.gpu_memory_utilization, *shape)
    if num_seqs < profile.max_num_seqs:
        yield (
            f"--max-num-seqs {profile.max_num_seqs}: of full length {num_seqs} have room at once "
            "by this estimate; when the cache is full, vLLM lets others wait or computes them again"
        )
    if options.kv_cache_dtype != "fp8":
        yield f"the estimate is for a KV cache in fp8, not in {options.kv_cache_dtype}"


def _compared(
    profile: Profile, original: Profile, options: ServeOptions, room: Room
) -> Iterator[tuple[str, float, float, str]]:
    """Yield flag, value, the original profile's value, and why the two may differ."""
    asked = "as asked for"
    length, num_seqs = profile.max_model_len, profile.max_num_seqs
    longest = (
        "all positions that the model has"
        if length == room.model_limit
        else "the longest that fits"
    )
    why = asked if options.max_model_len else longest
    yield "--max-model-len", length, original.max_model_len, why
    why = f"auto takes as many of full length as fit, {MOST_SEQUENCES} at most"
    yield "--max-num-seqs", num_seqs, original.max_num_seqs, asked if options.max_num_seqs else why
    share = profile.gpu_memory_utilization, original.gpu_memory_utilization
    why = asked if options.gpu_memory_utilization else UNIFIED_MEMORY_WHY
    yield "--gpu-memory-utilization", *share, why
    step = options.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS
    yield "--max-num-batched-tokens", step, MAX_NUM_BATCHED_TOKENS, asked


def _filled(options: ServeOptions, profile: Profile, room: Room) -> ServeOptions:
    """Return `options` with the profile's values."""
    options = replace(
        options,
        max_model_len=profile.max_model_len,
        max_num_seqs=profile.max_num_seqs,
        served_model_names=options.served_model_names or SERVED_MODEL_NAMES,
    )
    if room.hardware.gpu is None:
        # Memory is given in bytes on a CPU, and `build_command` sees to the size of a step.
        cache_gib = options.kv_cache_gib or room.cpu_cache_gib(profile.max_model_len)
        return replace(options, gpu_memory_utilization=None, kv_cache_gib=cache_gib)
    return replace(
        options,
        gpu_memory_utilization=profile.gpu_memory_utilization,
        max_num_batched_tokens=options.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS,
    )


def adapt(
    options: ServeOptions, hardware: Hardware, vllm: InstalledVllm
) -> tuple[ServeOptions, list[str]]:
    """Return `options` with what suits the hardware, and notes on it and on the drafts.

    Without it two ranks on PCIe can hang, and a machine whose memory is the GPU's can stop. What
    `options` and the environment say stays.
    """
    notes: list[str] = []
    variables: tuple[Setting, ...] = () if hardware.gpu is None else GPU_ENVIRONMENT
    flags: tuple[Setting, ...] = ()
    if hardware.link == "pcie" and options.num_ranks > 1:
        variables, flags = variables + PCIE_ENVIRONMENT, PCIE_FLAGS
    else:
        why = "a CPU" if hardware.gpu is None else _LINKS.get(hardware.link, "a single rank")
        notes.append(f"{', '.join(map(str, PCIE_FLAGS))} and the NCCL variables left out: {why}")
    environment: dict[str, str] = {}
    for setting in variables:
        users = os.environ.get(setting.name)
        if users is not None and users != setting.value:
            notes.append(f"{setting} left out: the environment has {setting.name}={users}")
        else:
            assert setting.value is not None
            environment[setting.name] = setting.value
            if not setting.source.startswith(ACTI):
                notes.append(f"{setting}: {setting.why} ({setting.source})")
    words = [word for flag in flags for word in flag.as_args()]
    share = hardware.most_utilization if hardware.unified_memory else None
    options = replace(
        options,
        gpu_memory_utilization=options.gpu_memory_utilization or share,
        environment={**environment, **options.environment},
        extra_args=(*words, *options.extra_args),
    )
    return options, [*explain_drafting(options, vllm.platform), *notes]


def explain_drafting(options: ServeOptions, platform: Platform) -> Iterator[str]:
    """Say what is drafted, as far as that is not vLLM's own way."""
    if num_speculative_tokens(options, platform) == 0:
        yield NO_DRAFTING
        return
    if options.num_speculative_tokens is None and DEFAULT_K[platform] > 1:
        yield (
            f"{DEFAULT_K[platform]} tokens drafted a step: the default on GPUs, where one CUDA "
            "graph computes them; Acti drafts 1 (--k)"
        )
    if options.draft_lm_head_quantization is not None:
        yield (
            f"draft_lm_head_quantization {options.draft_lm_head_quantization}: drafts read a copy "
            "of the LM head in it, besides the model's own; only the acceptance can change"
        )
    if platform == "cuda" and options.draft_sample_method in (None, DEFAULT_SAMPLING):
        yield (
            "draft_sample_method probabilistic: at a temperature above 0 the head draws its "
            "drafts, which are accepted more often; their logits are kept on the GPU"
        )


def _node_flags(hardware: Hardware, node: Node, notes: list[str]) -> tuple[str, ...]:
    """Return vLLM's own flags for several machines."""
    if hardware.num_nodes == 1:
        if node != Node():
            raise GraftError(
                f"{hardware}: one machine; --node-rank and --master-addr expect several (--nnodes)"
            )
        return ()
    if node.master_address is None:
        raise GraftError(f"{hardware}: expected the address of the first of them as --master-addr")
    if not 0 <= node.rank < hardware.num_nodes:
        raise GraftError(
            f"{hardware}: --node-rank {node.rank}; expected one below {hardware.num_nodes}"
        )
    notes.append(
        f"run this command on every machine, with --node-rank 0 to {hardware.num_nodes - 1}; "
        "where vLLM takes the wrong network, set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
    )
    return (
        *("--nnodes", str(hardware.num_nodes), "--node-rank", str(node.rank)),
        *("--master-addr", node.master_address),
        *(("--headless",) if node.rank else ()),
    )


_LINKS = {"nvlink": "the GPUs have NVLink", "network": "the ranks speak over the network"}
