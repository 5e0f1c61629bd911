"""How much context the memory of the hardware leaves room for: `memory.py` applied to a plan."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_graft.errors import GraftError
from mtp_graft.serving.memory import (
    BLOCK_TOKENS,
    RESERVE_BYTES,
    kv_cache_bytes,
    largest_context,
    weights_bytes_per_rank,
)
from mtp_graft.serving.topology import Hardware

_GIB = 2**30
_CPU_CACHE_GIB = 1.0


@dataclass(frozen=True)
class Room:
    """The memory of one rank: what the weights take and what is left for the KV cache."""

    config: Mapping[str, Any]
    hardware: Hardware
    tp: int
    weights_bytes: int
    tokens_in_flight: int  # vLLM keeps what the steps in work read and write, besides the context
    cache_bytes: int | None  # asked for; None: what is left, and on a CPU what is needed

    @property
    def model_limit(self) -> int:
        """Return the positions that the model has."""
        return int(self.config.get("max_position_embeddings", 2**20))

    def cache_budget(self, utilization: float) -> int:
        """Return the bytes for the KV cache on each GPU; negative if the weights do not fit."""
        if self.cache_bytes is not None:
            return self.cache_bytes
        return int(utilization * self.hardware.memory_bytes) - self.weights_bytes - RESERVE_BYTES

    def largest_context(self, utilization: float) -> int:
        """Return the longest sequence that can be served, in whole blocks where memory decides."""
        if self.hardware.gpu is None and self.cache_bytes is None:
            return self.model_limit
        budget = self.cache_budget(utilization)
        if budget <= 0:
            return 0
        tokens = largest_context(
            self.config, budget, num_seqs=1, tokens_in_flight=self.tokens_in_flight
        )
        return tokens if tokens == self.model_limit else tokens // BLOCK_TOKENS * BLOCK_TOKENS

    def num_sequences(self, utilization: float, tokens: int, most: int) -> int:
        """Return how many sequences of `tokens` have room at once, at most `most`."""
        budget = self.cache_budget(utilization)
        if self.hardware.gpu is None and self.cache_bytes is None:
            budget = int(self.cpu_cache_gib(tokens) * _GIB)
        for number in range(1, most + 1):
            longest = largest_context(self.config, budget, number, self.tokens_in_flight)
            if longest < tokens:
                return number - 1
        return most

    def cpu_cache_gib(self, tokens: int) -> float:
        """Return the cache that a CPU needs for one sequence, at least the usual size."""
        needed = kv_cache_bytes(self.config, tokens, tokens)
        return max(_CPU_CACHE_GIB, -(-needed * 10 // _GIB) / 10)

    def describe(self, utilization: float, tokens: int) -> str:
        """Say what the estimate is, and what a context of `tokens` takes of it."""
        needed = kv_cache_bytes(self.config, tokens, self.tokens_in_flight)
        weights = f"estimate for a rank: weights {self.weights_bytes / _GIB:.1f} GiB"
        if self.hardware.gpu is None:
            return f"{weights}, decoded; KV cache of {tokens} tokens {needed / _GIB:.2f} GiB"
        budget = self.cache_budget(utilization)
        return (
            f"{weights}, {RESERVE_BYTES / _GIB:.0f} GiB for all else, {max(budget, 0) / _GIB:.1f} "
            f"GiB left for the KV cache at {utilization:.2f} of the memory; a sequence of {tokens} "
            f"tokens takes {needed / _GIB:.1f} GiB of it (docs/doctor.md)"
        )


def measure_room(
    checkpoint: Path,
    config: Mapping[str, Any],
    hardware: Hardware,
    tp: int,
    *,
    tokens_in_flight: int,
    cache_gib: float | None,
) -> Room:
    """Return the room that a checkpoint leaves on a rank.

    Raises GraftError if the weights, or with them the cache asked for, are more than the memory.
    """
    on_cpu = hardware.gpu is None
    weights = weights_bytes_per_rank(checkpoint, tp, decoded=on_cpu)
    # All ranks of a CPU share one memory.
    memory = _physical_memory() // tp if on_cpu else hardware.memory_bytes
    if weights > memory:
        raise GraftError(
            f"{checkpoint}: the weights take {weights / _GIB:.1f} GiB of a rank's memory, and "
            f"there are {memory / _GIB:.1f} ({hardware}; {tp} rank{'s' if tp > 1 else ''}); "
            + ("a CPU is for small models" if on_cpu else "take more GPUs, or larger ones")
        )
    cache_bytes = None if cache_gib is None else int(cache_gib * _GIB)
    most = memory - weights - (0 if on_cpu else RESERVE_BYTES)
    if cache_bytes is not None and cache_bytes > most:
        raise GraftError(
            f"{checkpoint}: --kv-cache-gib {cache_gib:g}: beside weights of {weights / _GIB:.1f} "
            f"GiB there is room for {max(most, 0) / _GIB:.1f} on {hardware}; take less"
        )
    return Room(config, hardware, tp, weights, tokens_in_flight, cache_bytes)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
