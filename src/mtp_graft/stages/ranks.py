"""Several processes on one stage, as torchrun starts them: who am I, wait for all, ask all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")
Unit = TypeVar("Unit")


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that share the work."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def share(self, units: list[Unit]) -> list[Unit]:
        """Return this rank's part of the units of work."""
        return units[self.rank :: self.size]

    def device(self, name: str) -> str:
        """Return this rank's device: `cuda` is the GPU of its number on this host."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.size > 1 else name

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Value) -> list[Value]:
        """Return every rank's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Value | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return [v for v in values if v is not None]


def num_ranks() -> int:
    """Return how many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Say whether this is the rank that speaks, and writes what is one for all."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """Join the ranks that torchrun started, over gloo; without it, be the only one.

    Nothing large goes between ranks: each writes files of its own.
    """
    size = num_ranks()
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), size, int(os.environ["LOCAL_RANK"]))
    finally:
        dist.destroy_process_group()
