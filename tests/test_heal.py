"""Healing: what is trained, what it is judged by, and the head that comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.recipe import HealSection
from mtp_graft.stages.heal import UPSTREAM, heal
from synthetic_capture import random_sequences, write_capture


def test_trial(tiny_model: Path, tmp_path: Path) -> None:
    sequences = random_sequences((40, 30, 20, 35), hidden=256, vocab=4096)
    sequences += random_sequences((40, 25), hidden=256, vocab=4096, split="evaluation", seed=1)
    write_capture(tmp_path / "capture", sequences)
    settings = HealSection(steps=6, look_every=3, batch_tokens=60, device="cpu", loss={"ce": 1.0})
    found = heal(
        tmp_path / "capture", tmp_path, tiny_model / "upstream", tiny_model / "base",
        tmp_path / "heal", "mxfp4", 128, settings, lambda *a: print(*a),
    )
    print(found)
