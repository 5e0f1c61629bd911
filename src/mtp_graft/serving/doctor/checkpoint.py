"""A checkpoint folder as doctor sees it, read from config, index and headers without giving up.

Tensors go by the names that vLLM reads: a misnamed one is not also a missing and an unknown one.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_graft.checkpoint.quantization_config import QuantizationConfig, read_quantization
from mtp_graft.checkpoint.shards import INDEX_NAME, Shard, read_weight_map
from mtp_graft.dsv4.config import check_dimensions, compress_ratios
from mtp_graft.dsv4.formats import Format, Parts, format_of, modules_of
from mtp_graft.dsv4.names import from_transformers
from mtp_graft.errors import GraftError
from mtp_graft.serving.command import read_config

_EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_EXPERT = re.compile(r"(?P<before>\.experts\.\d+\.)(?P<matrix>gate_proj|up_proj|down_proj)\.")
_LAYER = re.compile(r"^layers\.(\d+)\.")
_SCALE = re.compile(r"\.(weight_scale_inv|scale)$")
#: vLLM's own name of a layer's router bias is transformers'.
_READ_AS_IT_IS = re.compile(r"layers\.\d+\.ffn\.gate\.e_score_correction_bias")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds."""

    folder: Path
    config: Mapping[str, Any]
    index: Mapping[str, str]  # tensor name -> shard, as written
    shards: Mapping[str, Mapping[str, Tensor]]  # readable shard -> its tensors, meta
    unreadable: Mapping[str, str]  # shard -> why

    @cached_property
    def read_as(self) -> dict[str, str]:
        """Return stored name -> the name that is read."""
        held = {name for held in self.shards.values() for name in held}
        return {n: canonical_name(n, self.num_layers) for n in sorted(held | self.index.keys())}

    @cached_property
    def misnamed(self) -> dict[str, str]:
        """Return stored name -> right name, of tensors that vLLM has no rule for as they are."""
        if self.foreign_format:
            return {}
        wrong = {name: right for name, right in self.read_as.items() if right != name}
        return {n: right for n, right in wrong.items() if not _READ_AS_IT_IS.fullmatch(n)}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Return every readable tensor by the name that is read."""
        return {self.read_as[n]: t for held in self.shards.values() for n, t in held.items()}

    @cached_property
    def unseen(self) -> set[str]:
        """Return names that the index lists and no readable shard holds."""
        return {self.read_as[name] for name in self.index} - self.tensors.keys()

    @cached_property
    def modules(self) -> Mapping[str, Parts]:
        """Return the tensors, grouped."""
        return modules_of(self.tensors)

    @cached_property
    def formats(self) -> dict[str, Format | None]:
        """Return the format that each module is stored in."""
        return {module: format_of(parts) for module, parts in self.modules.items()}

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
        sizes = Counter(
            8 * parts["weight_packed"].shape[-1] // max(1, scale.shape[-1])
            for module, parts in self.modules.items()
            if self.formats[module] == "int4"
            and (scale := parts.get("weight_scale")) is not None
            and scale.dim() == parts["weight_packed"].dim() == 2
        )
        return sizes.most_common(1)[0][0] if sizes else 128

    @cached_property
    def has_head(self) -> bool:
        """Return whether there is any `mtp.*` tensor, be it in the index alone."""
        return any(name.startswith("mtp.") for name in self.tensors.keys() | self.unseen)

    @cached_property
    def quantization(self) -> QuantizationConfig | GraftError:
        """Return the config's section as vLLM reads it, or why it cannot."""
        try:
            return read_quantization(self.config)
        except GraftError as error:
            return error

    @cached_property
    def foreign_format(self) -> str | None:
        """Return who made the checkpoint, if its format is known and not W4A16-FP8."""
        section = self.config.get("quantization_config")
        section = section if isinstance(section, dict) else {}
        method = section.get("quant_method")
        scales = {t.dtype for held in self.shards.values() for n, t in held.items() if "scale" in n}
        if (self.folder / "hf_quant_config.json").exists() or "moe_quant_algo" in section:
            return "NVIDIA ModelOpt's"
        if method == "fp8" or (method is None and torch.float8_e8m0fnu in scales):
            blocks = {name.split(".")[1] for name in self.index if name.startswith("mtp.")}
            head = {0: "", 1: ", with an MTP head"}.get(len(blocks), ", with a DSpark drafter")
            return f"DeepSeek's own FP8 and MXFP4{head}"
        if method is None:
            return "MLX's" if isinstance(self.config.get("quantization"), dict) else None
        if isinstance(self.quantization, QuantizationConfig):
            kinds = {group.kind for group in self.quantization.config_groups.values()}
            return "compressed-tensors' NVFP4" if "nvfp4" in kinds else None
        return method if isinstance(method, str) and method != "compressed-tensors" else None


def read_dimensions(folder: Path) -> dict[str, Any]:
    """Return a DeepSeek-V4's config.json; raises GraftError for another or a bad dimension."""
    config = read_config(folder)
    check_dimensions(config, folder / "config.json")
    return config


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's config, index and shard headers.

    Raises GraftError for a config or an index that cannot be used, not for shards.
    """
    config, index = read_dimensions(folder), read_weight_map(folder / INDEX_NAME)
    shards: dict[str, Mapping[str, Tensor]] = {}
    unreadable: dict[str, str] = {}
    for name in sorted({path.name for path in folder.glob("*.safetensors")} | set(index.values())):
        try:
            with Shard(folder / name) as shard:
                shards[name] = shard.meta
        except GraftError as error:
            unreadable[name] = str(error).removeprefix(f"{folder / name}: ")
    return Checkpoint(folder, config, index, shards, unreadable)


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
