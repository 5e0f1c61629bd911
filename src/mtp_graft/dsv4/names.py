"""Names and shapes of a model's tensors: names are DeepSeek's, translated from transformers'."""

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mtp_graft.dsv4.config import Dimensions, check_dimensions, compress_ratios, num_stages
from mtp_graft.errors import GraftError

Shapes = dict[str, tuple[int, ...]]  # by plain name
Weights = Mapping[str, Tensor]  # likewise

HEAD_PREFIX = "mtp.0."
#: Copies of the target's, for which vLLM's drafter has rules on GPUs.
HEAD_COPIES = {"mtp.0.head.weight", "mtp.0.emb.tok_emb.weight"}

_DATA: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
QUANTIZED = re.compile(_DATA["patterns"]["quantized"])
NEVER_QUANTIZED = re.compile(_DATA["patterns"]["never_quantized"])
EXPERT = re.compile(_DATA["patterns"]["expert"])
FLOAT32 = re.compile(_DATA["patterns"]["float32"])
#: A stage's parameters in an `MTPHead`, which has one, and in a `DSpark`.
OF_STAGE = re.compile(r"^(?:layer|stages\.(\d+))\.")
_RENAMED = re.compile("|".join(pattern for pattern, _ in _DATA["renames"]))


def from_transformers(name: str) -> str:
    """Return DeepSeek's name for a transformers `deepseek_v4` parameter (fused experts apart)."""
    return _renamed(name, "renames") if _RENAMED.search(name) else name  # most are DeepSeek's


@cache  # of a checkpoint's names, which are asked for over and over
def from_vllm(name: str) -> str:
    """Return DeepSeek's name for a tensor that vLLM reads by its own name as well."""
    return _renamed(name, "from_vllm")


def _renamed(name: str, table: str) -> str:
    for pattern, target in _DATA[table]:
        name = re.sub(pattern, target, name)
    return name


def split_experts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Split one transformers tensor into DeepSeek-named ones.

    `...mlp.experts.gate_up_proj` [E, 2*M, D] becomes w1 and w3 [M, D] of every expert,
    `...mlp.experts.down_proj` [E, D, M] becomes w2; any other tensor keeps its values.
    """
    match = re.match(r"^(.*)\.mlp\.experts\.(gate_up_proj|down_proj)$", name)
    if match is None:
        return {from_transformers(name): tensor}
    prefix = from_transformers(f"{match[1]}.mlp.experts")
    fused = ("w2",) if match[2] == "down_proj" else ("w1", "w3")
    matrices = dict(zip(fused, tensor.chunk(len(fused), dim=1), strict=True))
    return {
        f"{prefix}.{e}.{m}.weight": w[e] for e in range(len(tensor)) for m, w in matrices.items()
    }


def head_from_module(state: Weights, stages: int = 1) -> dict[str, Tensor]:
    """Rename the state dict of an `MTPHead`, or of a `DSpark` of `stages`, to `mtp.*`, split."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        of_stage = OF_STAGE.match(name)
        block = 0 if name.startswith("main_") else stages - 1  # what leads in, and what leads out
        if of_stage and of_stage[1]:
            block = int(of_stage[1])
        # A leading dot lets the layer patterns match at the start of the name.
        for native, part in split_experts(f".{OF_STAGE.sub('', name)}", tensor).items():
            renamed[f"mtp.{block}{native}"] = part
    return renamed


class Drafter(NamedTuple):
    """What the `mtp.*` tensors of a checkpoint are."""

    kind: Literal["mtp", "dspark"]
    stages: int
    names: list[str]  # sorted


def find_drafter(found: Iterable[str], where: object) -> Drafter:
    """Return the drafter among the names `found` at `where`; GraftError for none or a part."""
    names = sorted(name for name in found if name.startswith("mtp."))
    if not names:
        raise GraftError(f"{where}: has no mtp.* tensors; expected an upstream with one")
    blocks = {name.split(".")[1] for name in names}
    is_dspark = any(name.startswith(f"{HEAD_PREFIX}main_proj.") for name in names)
    if blocks != {str(n) for n in range(len(blocks) if is_dspark else 1)}:
        listed = ",".join(sorted(blocks))
        expected = "mtp.0 alone, or a DSpark drafter's from mtp.0 on, with mtp.0.main_proj"
        cure = "a shard may be missing from the index"
        raise GraftError(f"{where}: has blocks mtp.{{{listed}}}; expected {expected}; {cure}")
    return Drafter("dspark" if is_dspark else "mtp", len(blocks), names)


def served_as(module: str, num_layers: int) -> str:
    """Return the name by which vLLM asks for the scheme of one of a drafter's modules.

    DSpark's `wkv` is asked for a second time, those of all stages as `model.context_wkv_proj`.
    """
    _, block, name = module.split(".", 2)
    within = "" if name == "main_proj" else f"layers.{num_layers + int(block)}."
    return f"model.{within}{name}"


def storage_dtype(name: str) -> torch.dtype:
    """Return the dtype that an unquantized tensor of this name is stored in."""
    if name.endswith(".tid2eid"):
        return torch.int32
    return torch.float32 if FLOAT32.search(name) else torch.bfloat16


# Shapes of decoded tensors


def head_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the drafter's decoded tensors; GraftError if config.json lacks a key."""
    stages = num_stages(config)
    sizes = _sizes(check_dimensions(config, dspark=stages > 0))
    blocks = [_layer(sizes) for _ in range(stages or 1)]
    blocks[0] |= _shapes("dspark" if stages else "mtp", sizes)
    blocks[-1] |= _shapes("output", sizes) | (_shapes("dspark_output", sizes) if stages else {})
    return {f"mtp.{n}.{name}": shape for n, b in enumerate(blocks) for name, shape in b.items()}


def base_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shape of every decoded tensor of the base; raises GraftError likewise."""
    sizes = _sizes(c := check_dimensions(config))
    shapes = _shapes("vocabulary", sizes) | _shapes("output", sizes)
    ratios, num_hashed, plain = compress_ratios(config) or [], c.num_hash_layers, _layer(sizes)
    if num_hashed is None:  # 3 is transformers' default
        num_hashed = 3 if c.mlp_layer_types is None else c.mlp_layer_types.count("hash_moe")
    for n in range(c.num_hidden_layers):
        layer = plain | _compression(sizes, ratios[n] if n < len(ratios) else 0)
        if n < num_hashed:  # it routes by a table instead of a bias
            del layer["ffn.gate.bias"]
            layer["ffn.gate.tid2eid"] = (c.vocab_size, c.num_experts_per_tok)
        shapes |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    return shapes


def _sizes(c: Dimensions) -> dict[str, Any]:
    """Return the config's keys, and what else shapes are made of."""
    keys = c.model_dump()
    return keys | {
        **{"1": 1, "3": 3},
        "heads_of_group": c.num_attention_heads * c.head_dim // c.o_groups,
        "mixes": (2 + c.hc_mult) * c.hc_mult,  # streams in, streams out, both
        "taps": len(keys.get("dspark_target_layer_ids", ())),
        "confidence": c.hidden_size + keys.get("dspark_markov_rank", 0),
    }


def _shapes(table: str, sizes: Mapping[str, Any], prefix: str = "") -> Shapes:
    return {
        prefix + name: tuple(math.prod(map(sizes.__getitem__, each.split("*"))) for each in shape)
        for name, shape in _DATA[table].items()
    }


def _layer(sizes: Mapping[str, Any]) -> Shapes:
    """Return a layer without compression: attention, feed-forward, and what leads in and out."""
    shapes, numbers = _shapes("layer", sizes), range(sizes["n_routed_experts"])
    expert = _shapes("expert", sizes).items()
    return shapes | {f"ffn.experts.{e}.{name}": shape for e in numbers for name, shape in expert}


def _compression(sizes: Mapping[str, Any], ratio: int) -> Shapes:
    """Return the compressor of a layer's keys and, at ratio 4, the indexer with its own."""
    if ratio <= 1:
        return {}
    shapes, widths, overlap = Shapes(), {"attn.": sizes["head_dim"]}, 1
    if ratio == 4:
        widths["attn.indexer."], overlap = sizes["index_head_dim"], 2  # windows overlap by half
        shapes = _shapes("indexer", sizes, "attn.indexer.")
    for prefix, width in widths.items():
        own = {**sizes, "ratio": ratio, "overlap": overlap, "width": width}
        shapes |= _shapes("compressor", own, f"{prefix}compressor.")
    return shapes
