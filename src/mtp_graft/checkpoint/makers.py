"""Who made a checkpoint, by its files, its config and its tensors' names.

What is read here are W4A16-FP8 bases, and heads as DeepSeek publishes them; all else is named.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from mtp_graft.checkpoint.files import read_object
from mtp_graft.checkpoint.quantization_config import with_section
from mtp_graft.checkpoint.shards import INDEX_NAME, Shard, read_weight_map
from mtp_graft.errors import GraftError

_PARTS: dict[str, str] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
#: Files that vLLM takes in place of the index's, wherever they are.
CONSOLIDATED = "consolidated*.safetensors"
PRUNED, _DEEPSEEK = "a pruned variant", _PARTS["scale"]
_NUMBERED = re.compile(r"(?:model\.)?layers\.(\d+)(?:\.(?:ffn|mlp)\.experts\.(\d+))?\b")


def foreign_maker(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Return who made a checkpoint; None for W4A16-FP8 and for what is not recognized."""
    section = with_section(config).get("quantization_config")
    section = section if isinstance(section, dict) else {}
    method, parts = section.get("quant_method"), {name.rpartition(".")[2] for name in names}
    nearby = () if names else (folder, *folder.glob("*"), *folder.glob("*/*"))
    markers = [
        ("GGUF", any(path.suffix.lower() == ".gguf" for path in nearby)),
        ("NVIDIA ModelOpt's", (folder / "hf_quant_config.json").exists()),
        ("NVIDIA ModelOpt's", "moe_quant_algo" in section),
        ("a merge by mergekit", any(folder.glob("mergekit_config.y*ml"))),
        ("MLX", method is None and isinstance(config.get("quantization"), dict)),
        (_DEEPSEEK, method == "fp8"),
        (f"quant_method {method}", isinstance(method, str) and method != "compressed-tensors"),
        *((maker, part in parts) for part, maker in _PARTS.items()),
    ]
    maker = next((maker for maker, is_there in markers if is_there), None) or None
    if maker != _DEEPSEEK:
        return maker or _pruned(config, names)
    blocks = {name.split(".")[1] for name in names if name.startswith("mtp.")}
    return maker + {0: "", 1: ", with an MTP head"}.get(len(blocks), ", with a DSpark drafter")


def _pruned(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Return what the tensors have less of than the config says, in every layer."""
    modules = {name.rpartition(".")[0].rpartition(".")[0] for name in names}  # far fewer
    found = {match.groups() for match in map(_NUMBERED.match, modules) if match}
    experts = Counter(layer for layer, expert in found if expert is not None)
    layers, most = len({layer for layer, _ in found}), max(experts.values(), default=0)
    for key, number in (("n_routed_experts", most), ("num_hidden_layers", layers)):
        if isinstance(said := config.get(key), int) and 0 < number < said:
            return f"{PRUNED}: has {number}, {key} is {said}"
    return None


def read_maker(folder: Path, part: str = "base") -> str | None:
    """Return the same of a folder or file in whatever state, or of the head in it by its names."""
    config, names = dict[str, Any](), list[str]()
    with suppress(GraftError):
        config = read_object(folder / "config.json", "a config")
    with suppress(GraftError):
        names = [*read_weight_map(folder / INDEX_NAME)]
    for path in () if names else folder.glob("*.safetensors"):
        with suppress(GraftError), Shard(path) as shard:
            names += shard.meta
    if part == "head" and (head := [name for name in names if name.startswith("mtp.")]):
        if any(name.endswith(".weight_packed") for name in head):
            return "a spliced head without its MTP_QUANT_MANIFEST.json (fetch that, too)"
        config, folder, names = {}, folder / "mtp", head
    return foreign_maker(folder, config, names)


def expect_format(folder: Path, part: Literal["base", "head", "served"]) -> None:
    """Raise GraftError for a format that is not read here, or shards that vLLM would not read."""
    maker = read_maker(folder, part)
    no_dspark = part == "served" and "DSpark" in (maker or "")
    if maker and (part == "base" or no_dspark or not maker.startswith(_DEEPSEEK)):
        expected = "DeepSeek's own release" if part == "head" else "a W4A16-FP8 checkpoint"
        raise GraftError(f"{folder}: is {maker}; expected {expected}; name such a one instead")
    for other in folder.rglob(CONSOLIDATED) if part == "served" else ():
        if other.name not in read_weight_map(folder / INDEX_NAME).values():
            found = f"vLLM reads it in place of the shards that {INDEX_NAME} names"
            raise GraftError(f"{other}: {found}; remove it, or use doctor's --fix")
