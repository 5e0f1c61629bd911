"""What is in a checkpoint folder, read from headers and config alone and without giving up early.

Names are taken to those that vLLM and this project read where another spelling of them is known,
so that a misnamed tensor is one finding and not also a missing and an unknown one.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mtp_graft.checkpoint.files import read_weight_map
from mtp_graft.checkpoint.shards import INDEX_NAME, open_shard, read_meta
from mtp_graft.dsv4.config import check_dimensions, compress_ratios
from mtp_graft.dsv4.names import from_transformers
from mtp_graft.dsv4.variants import group_by_module
from mtp_graft.errors import GraftError
from mtp_graft.serving.command import read_config
from mtp_graft.serving.doctor.formats import format_of, logical_shape

_EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_EXPERT = re.compile(r"(?P<before>\.experts\.\d+\.)(?P<matrix>gate_proj|up_proj|down_proj)\.")
_LAYER = re.compile(r"^layers\.(\d+)\.")
_SCALE = re.compile(r"\.(weight_scale_inv|scale)$")


@dataclass(frozen=True)
class Survey:
    """A checkpoint as it is."""

    folder: Path
    config: Mapping[str, Any]
    index: Mapping[str, str]  # tensor name -> shard, as written
    shards: Mapping[str, Mapping[str, Tensor]]  # readable shard -> its tensors, meta
    unreadable: Mapping[str, str]  # shard -> why

    @cached_property
    def renamed(self) -> dict[str, str]:
        """Return stored name -> the name that is read, where they differ."""
        every = {name for held in self.shards.values() for name in held} | self.index.keys()
        canonical = {name: canonical_name(name, self.num_layers) for name in sorted(every)}
        return {name: right for name, right in canonical.items() if right != name}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Return every readable tensor by the name it should have."""
        return {
            self.renamed.get(name, name): tensor
            for held in self.shards.values()
            for name, tensor in held.items()
        }

    @cached_property
    def unknown_state(self) -> set[str]:
        """Return names that the index lists and no readable shard holds."""
        return {self.renamed.get(name, name) for name in self.index} - self.tensors.keys()

    @cached_property
    def stems(self) -> dict[str, dict[str, Tensor]]:
        """Return stem -> part -> tensor."""
        return {
            stem: {part: self.tensors[name] for part, name in by_part.items()}
            for stem, by_part in group_by_module(self.tensors).items()
        }

    @property
    def num_layers(self) -> int:
        """Return the number of decoder layers, which is also the head's index in vLLM."""
        return int(self.config["num_hidden_layers"])

    @property
    def ratios(self) -> list[int]:
        """Return the compression ratios, empty if config.json has no list of them."""
        return compress_ratios(self.config) or []

    @cached_property
    def group_size(self) -> int:
        """Return the inputs per INT4 scale that most experts are stored with, 128 without any."""
        sizes: Counter[int] = Counter()
        for parts in self.stems.values():
            scale = parts.get("weight_scale")
            if format_of(parts) == "int4" and scale is not None and scale.dim() == 2:
                sizes[logical_shape("int4", parts)[-1] // max(1, scale.shape[-1])] += 1
        return sizes.most_common(1)[0][0] if sizes else 128

    @cached_property
    def has_head(self) -> bool:
        """Return whether there is any `mtp.*` tensor, be it in the index alone."""
        return any(name.startswith("mtp.") for name in self.tensors.keys() | self.unknown_state)


class Unusable(GraftError):
    """A file without which there is nothing to look at."""

    def __init__(self, file: Path, problem: str) -> None:
        super().__init__(problem)
        self.file = file


def read_survey(folder: Path) -> Survey:
    """Read a checkpoint's config, index and shard headers.

    Raises Unusable only for what leaves nothing to look at: no DeepSeek-V4 config, no index; and
    GraftError for what is no folder.
    """
    if not folder.is_dir():
        raise GraftError(f"{folder}: not a folder; expected a checkpoint with config.json")
    with _needed(folder / "config.json"):
        config = read_config(folder)
        check_dimensions(config)
    with _needed(folder / INDEX_NAME):
        index = read_weight_map(folder / INDEX_NAME)
    shards: dict[str, Mapping[str, Tensor]] = {}
    unreadable: dict[str, str] = {}
    files = {path.name for path in folder.glob("*.safetensors")}
    for shard in sorted(files | set(index.values())):
        if not (folder / shard).is_file():
            unreadable[shard] = "is not there"
            continue
        try:
            shards[shard] = _read_header(folder, shard)
        except GraftError as error:
            unreadable[shard] = str(error).removeprefix(f"{folder / shard}: ")
    return Survey(folder, config, index, shards, unreadable)


@contextmanager
def _needed(file: Path) -> Iterator[None]:
    try:
        yield
    except GraftError as error:
        raise Unusable(file, str(error)) from error


def _read_header(folder: Path, shard: str) -> dict[str, Tensor]:
    with open_shard(folder / shard) as tensors:
        names = list(tensors.keys())
    return read_meta(folder, dict.fromkeys(names, shard))


def canonical_name(name: str, num_layers: int) -> str:
    """Return the name that DeepSeek, vLLM and this project read for a tensor called `name`."""
    name = from_transformers(name)
    if (match := _LAYER.match(name)) and int(match[1]) >= num_layers:
        block = int(match[1]) - num_layers
        name = f"mtp.{block}.{name[match.end() :]}"
    if name.startswith("mtp."):
        name = name.replace(".mtp_block.", ".").replace(".shared_head.norm.", ".norm.")
    name = _EXPERT.sub(lambda m: f"{m['before']}{_EXPERT_NAMES[m['matrix']]}.", name)
    return _SCALE.sub(".weight_scale", name)
