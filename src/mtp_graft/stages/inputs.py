"""What the stages that replay the head read, checked against each other."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.checkpoint.capture import RECORDINGS, CapturedSequence, Recorded
from mtp_graft.checkpoint.shards import load_tensors, read_index, read_meta
from mtp_graft.dsv4.replay import model_config
from mtp_graft.errors import GraftError, in_words

Progress = Callable[[str, int, int], None]  # label, units done, units in all

REPORT_NAME = "report.json"


def read_model_config(base: Path) -> DeepseekV4Config:
    """Return the base's configuration; raises GraftError if config.json has none."""
    path = base / "config.json"
    try:
        settings = json.loads(path.read_text())
        if settings["model_type"] != "deepseek_v4":
            raise GraftError(f"{path}: model_type {settings['model_type']!r}, expected deepseek_v4")
        return model_config(settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraftError(
            f"{path}: {in_words(error)}; expected a DeepSeek-V4 configuration"
        ) from error


def read_base_tensor(base: Path, name: str, model: DeepseekV4Config) -> Tensor:
    """Return `embed.weight` or `head.weight` [V, D]; raises GraftError for another shape."""
    check_base_tensor(base, name, read_index(base), model)
    return load_tensors(base, [name])[name]


def check_base_tensor(
    base: Path, name: str, weight_map: Mapping[str, str], model: DeepseekV4Config
) -> None:
    """Raise GraftError if the base has no `name` [V, D]; reads its shard's header only."""
    if name not in weight_map:
        raise GraftError(f"{base}: its index lists no {name}; expected a DeepSeek-V4 checkpoint")
    found = list(read_meta(base, {name: weight_map[name]})[name].shape)
    expected = [model.vocab_size, model.hidden_size]
    if found != expected:
        raise GraftError(f"{base}: {name} is {found}, expected {expected} by its config.json")


def check_recorded(
    capture: Path,
    sequence: CapturedSequence,
    recorded: Recorded,
    model: DeepseekV4Config,
) -> None:
    """Raise GraftError for a recording of another model: other hidden size or vocabulary."""
    where = f"{capture / RECORDINGS / sequence.recording}: prompt {sequence.id!r}"
    hidden, largest = recorded.residual.shape[2], int(recorded.token_ids.max())
    if hidden != model.hidden_size:
        raise GraftError(
            f"{where}: residual has hidden size {hidden}, expected {model.hidden_size} by the "
            "base's config.json; capture and base are of different models"
        )
    if largest >= model.vocab_size:
        raise GraftError(
            f"{where}: has token {largest}, expected less than {model.vocab_size}; "
            "capture and base are of different models"
        )


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Let torch use `number` threads inside; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
