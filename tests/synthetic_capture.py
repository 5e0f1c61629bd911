"""Small captures of random sequences, made without a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mtp_graft.checkpoint.capture import RECORDINGS, CapturedSequence, append_row
from mtp_graft.checkpoint.shards import save_shard


@dataclass(frozen=True)
class Played:
    """One sequence as the server would have computed it."""

    split: str
    prompt_tokens: int
    token_ids: Tensor  # int [T]
    residual: Tensor  # [T, S, D]
    taps: Tensor | None = None  # [T, L, D]


def write_capture(folder: Path, sequences: Sequence[Played], per_recording: int = 2) -> None:
    """Write a capture folder, several sequences a recording as the server's passes have them."""
    (folder / RECORDINGS).mkdir(parents=True)
    for first in range(0, len(sequences), per_recording):
        together = sequences[first : first + per_recording]
        name = f"{first:06d}.safetensors"
        token_ids = torch.cat([s.token_ids for s in together]).int()
        residual = torch.cat([s.residual.flatten(1) for s in together]).bfloat16()
        targets = token_ids.roll(-1)  # as if the base had foretold every token
        tensors = {"token_ids": token_ids, "residual": residual, "targets": targets}
        if taps := [s.taps.flatten(1) for s in together if s.taps is not None]:
            tensors["taps"] = torch.cat(taps).bfloat16()
        save_shard(tensors, folder / RECORDINGS / name)
        start = 0
        for number, s in enumerate(together, start=first):
            size = (s.prompt_tokens, len(s.token_ids))
            line = CapturedSequence(number, f"prompt-{number}", s.split, *size, name, start)
            append_row(folder, line)
            start += len(s.token_ids)


def random_sequences(
    lengths: Sequence[int], *, hidden: int = 256, vocab: int = 4096, split: str = "calibration",
    seed: int = 0,
) -> list[Played]:  # fmt: skip
    """Return sequences of random tokens and residuals, their first third being the prompt."""
    generator, played = torch.Generator().manual_seed(seed), []
    for length in lengths:
        token_ids = torch.randint(vocab, (length,), generator=generator)
        residual = torch.randn(length, 4, hidden, generator=generator)
        played.append(Played(split, max(1, length // 3), token_ids, residual))
    return played
