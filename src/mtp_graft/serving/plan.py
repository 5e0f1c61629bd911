"""Fits a serving profile to a checkpoint and the hardware, and says how."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtp_graft.dsv4.config import check_dimensions
from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving.command import ServeOptions, read_config
from mtp_graft.serving.memory import RESERVE_BYTES, Room, kv_cache_bytes, weights_bytes_per_rank
from mtp_graft.serving.profiles import (
    GPU_ENVIRONMENT,
    MAX_NUM_BATCHED_TOKENS,
    MOST_SEQUENCES,
    PCIE_ENVIRONMENT,
    PCIE_FLAGS,
    PROFILES,
    SERVED_MODEL_NAMES,
    Profile,
)
from mtp_graft.serving.topology import Hardware, most_ranks, undivided

AUTO = "auto"
_GIB = 2**30


@dataclass(frozen=True)
class Node:
    """This machine's place among several that serve together."""

    rank: int = 0
    master_address: str | None = None  # of the machine with rank 0


@dataclass(frozen=True)
class Plan:
    """Options with everything decided that the profile decides, and what was decided."""

    profile: str
    hardware: Hardware
    options: ServeOptions
    notes: tuple[str, ...]


def make_plan(
    options: ServeOptions, profile_name: str, hardware: Hardware, node: Node | None = None
) -> Plan:
    """Return how to serve `options.checkpoint` with a profile; what `options` set stays.

    Raises UsageError for an unknown profile. Raises GraftError for weights that do not fit, a
    context that does not (without one, `auto` takes the largest that does) or that the model has
    no positions for, ranks that hardware or model do not allow, and several machines without the
    address of the first.
    """
    config = read_config(options.checkpoint)
    check_dimensions(config, options.checkpoint / "config.json")
    options = replace(options, tensor_parallel_size=_ranks(options, config, hardware))
    room = _measure_room(options, config, hardware)
    name, profile = _fit(profile_name, options, room)
    notes = [*_decisions(name, profile, options, room)]
    options, adapted = adapt(_filled(options, profile, room), hardware)
    flags = _node_flags(hardware, node or Node())
    options = replace(options, extra_args=(*flags, *options.extra_args))
    return Plan(name, hardware, options, (*notes, *adapted))


def _ranks(options: ServeOptions, config: Mapping[str, Any], hardware: Hardware) -> int:
    """Return the ranks asked for, or the most that hardware and model allow.

    Raises GraftError if those asked for are more than that, or do not divide the model.
    """
    wanted = options.tensor_parallel_size
    if wanted is None:
        return most_ranks(config, hardware.num_gpus)
    flag = f"--tensor-parallel-size {wanted}"
    if hardware.gpu is not None and wanted > hardware.num_gpus:
        raise GraftError(f"{flag} on {hardware}; expected at most {hardware.num_gpus}")
    if wanted > 1 and (uneven := undivided(config, wanted)):
        raise GraftError(
            f"{flag}: config.json has {uneven}, which the ranks cannot share evenly; "
            "expected a number that divides it"
        )
    return wanted


def _measure_room(options: ServeOptions, config: Mapping[str, Any], hardware: Hardware) -> Room:
    """Return the room on a rank; raises GraftError if weights and the cache asked for have none."""
    ranks, on_cpu = options.num_ranks, hardware.gpu is None
    weights = weights_bytes_per_rank(options.checkpoint, ranks, decoded=on_cpu)
    if options.draft_lm_head_quantization is not None:  # a copy of at most a byte a weight
        weights += config["vocab_size"] * config["hidden_size"] // ranks
    # All ranks of a CPU share one memory.
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    left = physical // ranks if on_cpu else hardware.memory_bytes - RESERVE_BYTES
    left -= weights
    cache = None if options.kv_cache_gib is None else int(options.kv_cache_gib * _GIB)
    if left < (cache or 0):
        asked = "" if cache is None else f"--kv-cache-gib {options.kv_cache_gib:g}: "
        raise GraftError(
            f"{options.checkpoint}: {asked}the weights take {weights / _GIB:.1f} GiB on each of "
            f"{ranks} ranks, which leaves {max(left, 0) / _GIB:.1f} GiB for a KV cache on "
            f"{hardware}; take {'a smaller model' if on_cpu else 'more GPUs, or larger ones'}"
            f"{'' if cache is None else ', or a smaller cache'}"
        )
    # Twice: with asynchronous scheduling the next step is prepared while one is computed.
    in_flight = 2 * (options.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS)
    return Room(config, hardware, weights, in_flight, cache)


def _fit(wanted: str, options: ServeOptions, room: Room) -> tuple[str, Profile]:
    """Return a profile with what the options say; for `auto` the longest context that fits.

    Where no context fits whole, `auto` takes the one that gets furthest and cuts it, unless it was
    asked for.
    """
    if wanted not in (*PROFILES, AUTO):
        names = ", ".join((*PROFILES, AUTO))
        raise UsageError(f"--profile {wanted}: unknown; expected one of {names}, or none")
    profiles = {
        name: _with_options(profile, options, room.hardware)
        for name, profile in PROFILES.items()
        if wanted in (name, AUTO)
    }
    largest = {
        name: room.largest_context(profile.gpu_memory_utilization)
        for name, profile in profiles.items()
    }
    fitting = [name for name, profile in profiles.items() if profile.max_model_len <= largest[name]]
    if fitting:
        name = max(fitting, key=lambda name: PROFILES[name].max_model_len)
        profile = profiles[name]
    else:
        name = max(largest, key=lambda name: largest[name])
        if wanted != AUTO or options.max_model_len is not None or largest[name] == 0:
            raise _no_room(profiles[name], largest[name], options, room)
        profile = replace(profiles[name], max_model_len=largest[name])
    if wanted == AUTO and options.max_num_seqs is None and room.hardware.gpu is not None:
        num_seqs = room.num_sequences(profile.gpu_memory_utilization, profile.max_model_len)
        profile = replace(profile, max_num_seqs=min(num_seqs, MOST_SEQUENCES))
    return name, profile


def _with_options(profile: Profile, options: ServeOptions, hardware: Hardware) -> Profile:
    """Return the profile with what the options say, and the memory it may take."""
    share = min(profile.gpu_memory_utilization, hardware.most_utilization)
    return replace(
        profile,
        max_model_len=options.max_model_len or profile.max_model_len,
        max_num_seqs=options.max_num_seqs or profile.max_num_seqs,
        gpu_memory_utilization=options.gpu_memory_utilization or share,
    )


def _no_room(profile: Profile, largest: int, options: ServeOptions, room: Room) -> GraftError:
    """Return the error of a context that the model or the memory has no room for."""
    length, positions = profile.max_model_len, room.config.get("max_position_embeddings", 2**20)
    why = f"the model has {positions} positions" if length > positions else _estimate(profile, room)
    cures = ["more GPUs, or larger ones, or a larger --gpu-memory-utilization or --kv-cache-gib"]
    if largest > 0:
        cures = [f"--max-model-len {largest}", f"--profile {AUTO}", *cures]
    return GraftError(
        f"{options.checkpoint}: a context of {length} tokens has no room on {room.hardware}: "
        f"{why}; take {', '.join(cures)}"
    )


def _decisions(name: str, profile: Profile, options: ServeOptions, room: Room) -> Iterator[str]:
    """Say which profile it is, where it was cut or is too wide, and what memory it takes."""
    yield f"profile {name}: {profile.why}"
    if options.max_model_len is None and profile.max_model_len < PROFILES[name].max_model_len:
        yield (
            f"--max-model-len {profile.max_model_len}: the most that model and memory have room "
            f"for, where the profile has {PROFILES[name].max_model_len}"
        )
    yield _estimate(profile, room)
    if room.hardware.gpu is not None:
        fitting = room.num_sequences(profile.gpu_memory_utilization, profile.max_model_len)
        if fitting < profile.max_num_seqs:
            yield (
                f"--max-num-seqs {profile.max_num_seqs}: of full length {fitting} have room at "
                "once by this estimate; others wait, or vLLM computes them again"
            )


def _estimate(profile: Profile, room: Room) -> str:
    length, share = profile.max_model_len, profile.gpu_memory_utilization
    needed = f"{kv_cache_bytes(room.config, length, room.tokens_in_flight) / _GIB:.2f} GiB"
    weights = f"estimate for a rank: weights {room.weights_bytes / _GIB:.1f} GiB"
    if room.hardware.gpu is None:
        return f"{weights}, decoded; KV cache of {length} tokens {needed}"
    left = max(room.cache_budget(share), 0) / _GIB
    return (
        f"{weights}, {RESERVE_BYTES / _GIB:.0f} GiB for all else, {left:.1f} GiB left for the KV "
        f"cache at {share:g} of the memory; a sequence of {length} tokens takes {needed} of it "
        "(docs/doctor.md)"
    )


def _filled(options: ServeOptions, profile: Profile, room: Room) -> ServeOptions:
    """Return `options` with the profile's values; on a CPU the cache is given in bytes."""
    options = replace(
        options,
        max_model_len=profile.max_model_len,
        max_num_seqs=profile.max_num_seqs,
        served_model_names=options.served_model_names or SERVED_MODEL_NAMES,
    )
    if room.hardware.gpu is None:
        needed = kv_cache_bytes(room.config, profile.max_model_len, profile.max_model_len)
        cache_gib = options.kv_cache_gib or max(1.0, -(-needed * 10 // _GIB) / 10)
        return replace(options, gpu_memory_utilization=None, kv_cache_gib=cache_gib)
    return replace(
        options,
        gpu_memory_utilization=profile.gpu_memory_utilization,
        max_num_batched_tokens=options.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS,
    )


def adapt(options: ServeOptions, hardware: Hardware) -> tuple[ServeOptions, list[str]]:
    """Return `options` with what suits the hardware, and notes on it.

    Without it two ranks on PCIe can hang, and a machine whose memory is the GPU's can stop. What
    `options` and the environment say stays.
    """
    wanted = {} if hardware.gpu is None else dict(GPU_ENVIRONMENT)
    flags: tuple[str, ...] = ()
    notes = []
    if hardware.link == "pcie" and options.num_ranks > 1:
        wanted, flags = {**wanted, **PCIE_ENVIRONMENT}, PCIE_FLAGS
        notes.append("Acti's settings for GPUs without NVLink between them (docs/serving.md)")
    environment = {name: value for name, value in wanted.items() if name not in os.environ}
    notes += [f"{n}: the environment has {os.environ[n]}" for n in wanted if n in os.environ]
    share = hardware.most_utilization if hardware.unified_memory else None
    options = replace(
        options,
        gpu_memory_utilization=options.gpu_memory_utilization or share,
        environment={**environment, **options.environment},
        extra_args=(*flags, *options.extra_args),
    )
    return options, notes


def _node_flags(hardware: Hardware, node: Node) -> tuple[str, ...]:
    """Return vLLM's own flags for several machines."""
    if hardware.num_nodes == 1 and node == Node():
        return ()
    if node.master_address is None or node.rank >= hardware.num_nodes:
        raise GraftError(
            f"--node-rank {node.rank} --master-addr {node.master_address} on {hardware}: expected "
            "several machines (--nnodes), a rank below their number, and the address of the first"
        )
    return (
        *("--nnodes", str(hardware.num_nodes), "--node-rank", str(node.rank)),
        *("--master-addr", node.master_address),
        *(("--headless",) if node.rank else ()),
    )
