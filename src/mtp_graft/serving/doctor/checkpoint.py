"""A checkpoint folder as doctor sees it: config, index, headers, by the names that vLLM reads."""

import re
from collections import Counter
from collections.abc import Mapping, Set
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mtp_graft.checkpoint.makers import CONSOLIDATED, foreign_maker
from mtp_graft.checkpoint.manifest import Json
from mtp_graft.checkpoint.quantization_config import INTEGERS, QuantizationConfig, read_quantization
from mtp_graft.checkpoint.shards import INDEX_NAME, Shard, read_weight_map
from mtp_graft.dsv4 import names as dsv4
from mtp_graft.dsv4.config import compress_ratios, num_stages
from mtp_graft.dsv4.names import EXPERT, QUANTIZED, base_shapes, head_shapes
from mtp_graft.dsv4.variants import Parts, format_of, modules_of, weight_of
from mtp_graft.errors import GraftError
from mtp_graft.serving.command import read_config

_LAYER = re.compile(r"^layers\.(\d{1,6})\.")
_ROUTER = re.compile(r"layers\.\d+\.(ffn|mlp)\.gate\.weight$")
_OTHER_BLOCK = re.compile(r"^mtp\.[1-9]\d*\.")
_SCALE = re.compile(r"\.(weight_scale_inv|scale)$")

Names = Mapping[str, str]
Shards = Mapping[str, Mapping[str, Tensor]]  # shard -> its tensors, meta


class Checkpoint:
    """What a folder holds: config, index, the shards that are readable, and why others are not."""

    def __init__(
        self, folder: Path, config: Json, index: Names, shards: Shards, unreadable: Names
    ) -> None:
        self.folder, self.config, self.index, self.unreadable = folder, config, index, unreadable
        self.num_layers: int = config["num_hidden_layers"]  # also the head's index in vLLM
        self.ratios = compress_ratios(config) or []
        #: The config's section as vLLM reads it, or why it cannot.
        self.quantization: QuantizationConfig | GraftError
        try:
            self.quantization = read_quantization(config, folder / "config.json")
        except GraftError as error:
            self.quantization = error
        named, listed = set(index.values()), index.keys()
        #: Files that vLLM leaves out: the index does not name them, nor lacks a tensor of theirs.
        self.stale = {s for s in shards.keys() - named if not self._lost(shards[s].keys() - listed)}
        self.shards = {s: found for s, found in shards.items() if s not in self.stale}
        held = {name: found[name] for found in self.shards.values() for name in found}
        names = sorted(held.keys() | index.keys())
        self.read_as = {name: canonical_name(name, self.num_layers) for name in names}
        self.tensors = {self.read_as[name]: tensor for name, tensor in held.items()}
        #: Names that the index lists and no readable shard holds.
        self.unseen = {self.read_as[name] for name in index} - self.tensors.keys()
        #: Of a DSpark drafter's further blocks, if the config knows of none.
        blocks = () if num_stages(config) else filter(_OTHER_BLOCK.match, self.tensors)
        self.unsaid = dict.fromkeys(blocks)
        self.has_head = any(name.startswith("mtp.") for name in {*self.tensors, *self.unseen})
        self.modules: Mapping[str, Parts] = modules_of(self.tensors)
        #: The tensors' shapes, decoded, as config.json has them.
        self.shapes = base_shapes(config) | (head_shapes(config) if self.has_head else {})
        self._expert_outputs = self._most_expert_outputs()
        self.formats = {n: format_of(p, self._inputs(n)) for n, p in self.modules.items()}
        routed = min((sum(t.shape[:1]) for n, t in held.items() if _ROUTER.search(n)), default=0)
        told = {**config, "n_routed_experts": max(config["n_routed_experts"], routed)}
        #: Who made the checkpoint, if it is not W4A16-FP8 as config, routers and formats say.
        self.foreign_format = foreign_maker(folder, told, names) or self._odd_format()
        #: Routed experts of a layer -> inputs per scale that most are stored with; -1 for all.
        self.group_sizes = self._group_sizes()
        self.group_size = max(self.group_sizes.values(), default=128)

    def _most_expert_outputs(self) -> dict[tuple[str, bool], int]:
        """Return layer and whether of w2 -> most experts' outputs, which other matrices read."""
        found: dict[tuple[str, bool], Counter[int]] = {}
        for name, parts in self.modules.items():
            weight = weight_of(parts) if EXPERT.match(name) else None
            if weight is not None and weight.dim():
                key = name.rpartition(".experts.")[0], name.endswith("w2")
                found.setdefault(key, Counter())[len(weight)] += 1
        return {key: outputs.most_common(1)[0][0] for key, outputs in found.items()}

    def _inputs(self, module: str) -> int:
        layer, is_w2 = module.rpartition(".experts.")[0], module.endswith("w2")
        by_config = self.shapes.get(f"{module}.weight", (0,))[-1]
        return self._expert_outputs.get((layer, not is_w2), by_config)

    def _odd_format(self) -> str | None:
        """Return what many modules of the base are stored as that is not read here."""
        odd, dtypes = Counter[str](), ("plain", "fp8", None)
        if not (self.config.get("quantization_config") or {*self.formats.values()} - {"plain"}):
            return "a checkpoint without quantization"
        for name, kind in self.formats.items():
            is_expert = EXPERT.match(name)
            known = (*INTEGERS, "mxfp4", *dtypes) if is_expert else dtypes
            if QUANTIZED.match(name) and kind not in known:
                odd[f"{kind} {'routed' if is_expert else 'attention or shared'} experts"] += 1
        many = [what for what, number in odd.items() if number >= self.num_layers]
        return f"a checkpoint with {many[0]}" if many else None

    def _group_sizes(self) -> dict[str, int]:
        sizes: dict[str, Counter[int]] = {}
        for name, parts in self.modules.items():
            scale = parts.get("weight_scale")
            if self.formats[name] in INTEGERS and EXPERT.match(name) and scale is not None:
                columns = scale.shape[-1] if scale.dim() == 2 else 0
                found = sizes.setdefault(name.rpartition(".experts.")[0], Counter())
                found[self._inputs(name) // columns if columns > 1 else -1] += columns > 1
        return {layer: found.most_common(1)[0][0] for layer, found in sizes.items()}

    def _lost(self, unlisted: Set[str]) -> bool:
        """Return whether one of these tensors is one that the config asks for."""
        modules = modules_of({canonical_name(n, self.num_layers): torch.empty(0) for n in unlisted})
        asked = (base_shapes(self.config) | head_shapes(self.config)) if modules else {}
        return not modules.keys().isdisjoint(name.removesuffix(".weight") for name in asked)

    @property
    def misnamed(self) -> dict[str, str]:
        """Return stored name -> right name, of tensors that vLLM has no rule for as they are."""
        names = {} if self.foreign_format else self.read_as
        return {n: right for n, right in names.items() if right not in (n, dsv4.from_vllm(n))}


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config, index and headers; raises GraftError for a config or index of no use."""
    config, index = read_config(folder), read_weight_map(folder / INDEX_NAME)
    shards: dict[str, Mapping[str, Tensor]] = {}
    unreadable: dict[str, str] = {}
    named = set(index.values())
    there = [*folder.glob("*.safetensors"), *folder.rglob(CONSOLIDATED)]
    for name in sorted({path.relative_to(folder).as_posix() for path in there} | named):
        try:
            with Shard(folder / name) as shard:
                shards[name] = shard.meta
        except GraftError as error:
            if name in named:
                unreadable[name] = str(error).removeprefix(f"{folder / name}: ")
            else:
                shards[name] = {}
    return Checkpoint(folder, config, index, shards, unreadable)


@cache
def canonical_name(name: str, num_layers: int) -> str:
    """Return the name that DeepSeek, vLLM and this project read for a tensor called `name`."""
    name = dsv4.from_transformers(name)
    if (match := _LAYER.match(name)) and int(match[1]) >= num_layers:
        block = int(match[1]) - num_layers
        name = f"mtp.{block}.{name[match.end() :]}"
    if name.startswith("mtp."):
        name = name.replace(".mtp_block.", ".").replace(".shared_head.norm.", ".norm.")
    return _SCALE.sub(".weight_scale", name)
