"""What the stages that replay the head read, opened and checked against each other.

Shapes: T tokens of a sequence, S hyper-connection streams, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.checkpoint import capture as capture_files
from mtp_graft.checkpoint.capture import CapturedSequence, Recorded, read_recorded, read_sequences
from mtp_graft.checkpoint.files import read_object
from mtp_graft.checkpoint.shards import INDEX_NAME, load_tensors, read_index, read_meta
from mtp_graft.dsv4.names import upstream_head_names
from mtp_graft.dsv4.replay import model_config
from mtp_graft.errors import GraftError, in_words

Progress = Callable[[str, int, int], None]  # label, units done, units in all

REPORT_NAME = "report.json"
#: The splits of a capture: what experts are calibrated on, and what heads are scored on.
CALIBRATION, EVALUATION = "calibration", "evaluation"


@dataclass(frozen=True)
class Inputs:
    """A capture's sequences of one split, the base that it is of, and upstream's head."""

    capture: Path
    upstream: Path
    base: Path
    model: DeepseekV4Config
    shards: Mapping[str, str]  # of upstream's mtp.0.* tensors
    sequences: list[CapturedSequence]

    def files(self, *base_tensors: str) -> list[Path]:
        """Return all files that a stage's result depends on, with the base's of these tensors.

        Raises GraftError for a base without them, or with others than its config.json says.
        """
        recordings = {s.recording for s in self.sequences}
        weight_map = read_index(self.base)
        for name in base_tensors:
            check_base_tensor(self.base, name, weight_map, self.model)
        return [
            self.base / "config.json",
            self.capture / capture_files.INDEX_NAME,
            *(self.capture / capture_files.RECORDINGS / name for name in sorted(recordings)),
            *(self.upstream / shard for shard in sorted(set(self.shards.values()))),
            *(self.base / shard for shard in sorted({weight_map[n] for n in base_tensors})),
        ]

    def indexes(self) -> list[Path]:
        """Return the files that name all others, for a stage's manifest."""
        indexes = [folder / INDEX_NAME for folder in (self.upstream, self.base)]
        return [self.capture / capture_files.INDEX_NAME, *indexes]

    def read_upstream(self, names: list[str], device: str = "cpu") -> dict[str, Tensor]:
        """Read some of upstream's tensors to `device`."""
        pinned = device != "cpu"
        tensors = load_tensors(self.upstream, names, pinned=pinned)
        return {name: t.to(device, non_blocking=pinned) for name, t in tensors.items()}

    def read_base(self, name: str) -> Tensor:
        """Return the base's `embed.weight` or `head.weight` [V, D]."""
        return load_tensors(self.base, [name])[name]

    def read_sequence(self, sequence: CapturedSequence, device: str = "cpu") -> Recorded:
        """Return what was recorded of a sequence, its residual on `device`.

        Raises GraftError for a recording that is damaged or of another model.
        """
        model = self.model
        recorded = read_recorded(self.capture, sequence, model.hc_mult, device)
        hidden, largest = recorded.residual.shape[2], int(recorded.token_ids.max())
        found = f"token {largest}, expected less than {model.vocab_size}"
        if hidden != model.hidden_size:
            found = f"a residual of hidden size {hidden}, expected {model.hidden_size}"
        elif largest < model.vocab_size:
            return recorded
        path = self.capture / capture_files.RECORDINGS / sequence.recording
        raise GraftError(
            f"{path}: prompt {sequence.id!r} has {found} by the base's config.json; capture and "
            "base are of different models"
        )


def open_inputs(capture: Path, upstream: Path, base: Path, split: str) -> Inputs:
    """Return the inputs; raises GraftError for an upstream head or a base that is no such thing."""
    shards = read_index(upstream, "mtp.")
    head = {name: shards[name] for name in upstream_head_names(shards, upstream)}
    sequences = [s for s in read_sequences(capture) if s.split == split]
    return Inputs(capture, upstream, base, read_model_config(base), head, sequences)


def read_model_config(base: Path) -> DeepseekV4Config:
    """Return the base's configuration; raises GraftError if config.json has none."""
    path, what = base / "config.json", "a DeepSeek-V4 configuration"
    settings = read_object(path, what)
    try:
        if settings["model_type"] != "deepseek_v4":
            raise GraftError(f"{path}: model_type {settings['model_type']!r}, expected deepseek_v4")
        return model_config(settings)
    except (ValueError, KeyError, TypeError) as error:
        raise GraftError(f"{path}: {in_words(error)}; expected {what}") from error


def check_base_tensor(
    base: Path, name: str, weight_map: Mapping[str, str], model: DeepseekV4Config
) -> None:
    """Raise GraftError if the base has no `name` [V, D]; reads its shard's header only."""
    if name not in weight_map:
        raise GraftError(f"{base}: its index lists no {name}; expected a DeepSeek-V4 checkpoint")
    found = list(read_meta(base, name)[name].shape)
    expected = [model.vocab_size, model.hidden_size]
    if found != expected:
        raise GraftError(f"{base}: {name} is {found}, expected {expected} by its config.json")


@contextmanager
def single_thread() -> Iterator[None]:
    """Let torch use one CPU thread inside, so that no byte depends on the number of cores.

    The products of a small head gain little from more, and waiting for a busy core costs far more.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
