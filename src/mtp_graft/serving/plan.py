"""Fits a serving profile to a checkpoint and the hardware, and says how."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtp_graft.dsv4.config import check_dimensions
from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving.command import ServeOptions, read_config
from mtp_graft.serving.memory import (
    RESERVE_BYTES,
    kv_cache_bytes,
    largest_context,
    num_positions,
    weights_bytes_per_rank,
)
from mtp_graft.serving.profiles import (
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    ON_GPUS,
    ON_PCIE,
    PROFILES,
    SERVED_MODEL_NAMES,
    Profile,
    split,
)
from mtp_graft.serving.topology import Hardware, most_ranks, undivided

AUTO = "auto"
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Options with everything decided that the profile decides, and what was decided."""

    profile: str
    hardware: Hardware
    options: ServeOptions
    notes: tuple[str, ...]


def make_plan(
    options: ServeOptions,
    profile_name: str,
    hardware: Hardware,
    node_rank: int = 0,
    master_addr: str | None = None,
) -> Plan:
    """Return how to serve `options.checkpoint` with a profile; what `options` set stays.

    Of several machines, this one has `node_rank`, and the first `master_addr`. Raises UsageError
    for an unknown profile. Raises GraftError for a context that memory or model have no room for
    (without one, `auto` takes the largest that fits), for ranks that hardware or model do not
    allow, and for several machines without the address of the first.
    """
    config = read_config(options.checkpoint)
    check_dimensions(config, options.checkpoint / "config.json")
    options = replace(options, tensor_parallel_size=_ranks(options, config, hardware))
    room = _measure_room(options, config, hardware)
    name, fitted = _fit(profile_name, options, room)
    notes = [f"profile {name}: {PROFILES[name].why}", room.estimate(fitted)]
    if options.max_model_len is None and fitted.max_model_len != PROFILES[name].max_model_len:
        cut = f"the most that fits, where the profile has {PROFILES[name].max_model_len}"
        notes.append(f"--max-model-len {fitted.max_model_len}: {cut}")
    fitted, adapted = adapt(fitted, hardware)
    flags = _node_flags(hardware, node_rank, master_addr)
    fitted = replace(fitted, extra_args=(*flags, *fitted.extra_args))
    return Plan(name, hardware, fitted, (*notes, *adapted))


def _ranks(options: ServeOptions, config: Mapping[str, Any], hardware: Hardware) -> int:
    """Return the ranks asked for, or the most that hardware and model allow."""
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


@dataclass(frozen=True)
class _Room:
    """The memory of one rank, in bytes."""

    config: Mapping[str, Any]
    hardware: Hardware
    memory: int
    weights: int
    tokens_in_flight: int

    def cache(self, options: ServeOptions) -> int:
        """Return what is left for the KV cache; negative if the weights do not fit."""
        reserve = 0 if self.hardware.gpu is None else RESERVE_BYTES
        return int((options.gpu_memory_utilization or 1) * self.memory) - self.weights - reserve

    def largest_context(self, options: ServeOptions) -> int:
        """Return the longest sequence that can be served."""
        return largest_context(self.config, self.cache(options), self.tokens_in_flight)

    def estimate(self, options: ServeOptions) -> str:
        """Say what weights and a sequence take, and what is left for the KV cache."""
        length = options.max_model_len or 0
        needed = kv_cache_bytes(self.config, length, self.tokens_in_flight) / _GIB
        text = f"estimate for a rank: weights {self.weights / _GIB:.1f} GiB"
        if (share := options.gpu_memory_utilization) is not None:
            left = max(self.cache(options), 0) / _GIB
            text += (
                f", {RESERVE_BYTES / _GIB:.0f} GiB for all else, {left:.1f} GiB left for the KV "
                f"cache at {share:g} of the memory"
            )
        return f"{text}; a sequence of {length} tokens takes {needed:.2f} GiB (docs/doctor.md)"


def _measure_room(options: ServeOptions, config: Mapping[str, Any], hardware: Hardware) -> _Room:
    ranks, on_cpu = options.num_ranks, hardware.gpu is None
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = physical // ranks if on_cpu else hardware.memory_bytes  # a CPU's ranks share it
    weights = weights_bytes_per_rank(options.checkpoint, ranks, decoded=on_cpu)
    # Twice: with asynchronous scheduling the next step is prepared while one is computed.
    in_flight = 2 * (options.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS)
    return _Room(config, hardware, memory, weights, in_flight)


def _fit(wanted: str, options: ServeOptions, room: _Room) -> tuple[str, ServeOptions]:
    """Return the profile's name and `options` with its values.

    `auto` is the one that reaches furthest; its context is cut to what fits, unless it was asked
    for.
    """
    if wanted not in (*PROFILES, AUTO):
        names = ", ".join((*PROFILES, AUTO))
        raise UsageError(f"--profile {wanted}: unknown; expected one of {names}, or none")
    found: list[tuple[int, str, ServeOptions]] = []
    for name, profile in PROFILES.items():
        if wanted in (name, AUTO):
            filled = _filled(options, profile, wanted, room.hardware)
            found.append((room.largest_context(filled), name, filled))
    largest, name, filled = max(found, key=lambda each: min(each[0], each[2].max_model_len or 0))
    length = filled.max_model_len or 0
    if largest < length and (wanted != AUTO or options.max_model_len or largest == 0):
        positions = num_positions(room.config)
        too_long = f"the model has {positions} positions" if length > positions else None
        cures = "a smaller model, or more or larger GPUs, or a larger --gpu-memory-utilization"
        if largest > 0:
            cures = f"--max-model-len {largest}, --profile {AUTO}, {cures}"
        raise GraftError(
            f"{options.checkpoint}: a context of {length} tokens has no room on {room.hardware}: "
            f"{too_long or room.estimate(filled)}; take {cures}"
        )
    return name, replace(filled, max_model_len=min(length, largest))


def _filled(
    options: ServeOptions, profile: Profile, wanted: str, hardware: Hardware
) -> ServeOptions:
    """Return `options` with the profile's values where they say nothing."""
    on_cpu = hardware.gpu is None
    share = min(profile.gpu_memory_utilization, hardware.most_utilization)
    num_seqs = MAX_NUM_SEQS if wanted == AUTO else profile.max_num_seqs
    step = None if on_cpu else MAX_NUM_BATCHED_TOKENS
    return replace(
        options,
        max_model_len=options.max_model_len or profile.max_model_len,
        max_num_seqs=options.max_num_seqs or num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens or step,
        # A CPU's cache is given in bytes.
        gpu_memory_utilization=None if on_cpu else options.gpu_memory_utilization or share,
        served_model_names=options.served_model_names or SERVED_MODEL_NAMES,
    )


def adapt(options: ServeOptions, hardware: Hardware) -> tuple[ServeOptions, list[str]]:
    """Return `options` with what suits the hardware, and notes on it.

    Without it two ranks on PCIe can hang, and a machine whose memory is the GPU's can stop. What
    `options` and the environment say stays.
    """
    is_pcie = hardware.is_pcie_only and options.num_ranks > 1
    flags, wanted = split({**(ON_GPUS if hardware.gpu else {}), **(ON_PCIE if is_pcie else {})})
    notes = ["Acti's settings for GPUs without NVLink between them (docs/serving.md)"] * is_pcie
    notes += [f"{n}: the environment has {os.environ[n]}" for n in wanted if n in os.environ]
    environment = {name: value for name, value in wanted.items() if name not in os.environ}
    share = hardware.most_utilization if hardware.unified_memory else None
    options = replace(
        options,
        gpu_memory_utilization=options.gpu_memory_utilization or share,
        environment={**environment, **options.environment},
        extra_args=(*flags, *options.extra_args),
    )
    return options, notes


def _node_flags(hardware: Hardware, node_rank: int, master_addr: str | None) -> tuple[str, ...]:
    """Return vLLM's own flags for several machines."""
    if hardware.num_nodes == 1 and node_rank == 0 and master_addr is None:
        return ()
    if master_addr is None or node_rank >= hardware.num_nodes:
        raise GraftError(
            f"--node-rank {node_rank} --master-addr {master_addr} on {hardware}: expected several "
            "machines (--nnodes), a rank below their number, and the address of the first"
        )
    words = ("--nnodes", hardware.num_nodes, "--node-rank", node_rank, "--master-addr", master_addr)
    return (*map(str, words), *(("--headless",) if node_rank else ()))
