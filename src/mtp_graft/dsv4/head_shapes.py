"""Which tensors base and head have, and their logical shapes, from the model's config.

Shape legend: D hidden, S hyper-connection streams, E routed experts, M expert inputs of w2.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtp_graft.dsv4.config import compress_ratios
from mtp_graft.dsv4.names import HEAD_PREFIX, storage_dtype
from mtp_graft.errors import GraftError
from mtp_graft.quant import fp8_block, mxfp4


def head_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return plain name -> shape of every decoded tensor of the head: 797 of them for Flash.

    Raises GraftError if the config lacks one of the dimensions.
    """
    try:
        shapes = {**_outside(config), **_attention(config), **_feed_forward(config)}
    except KeyError as error:
        raise GraftError(f"config.json: has no {error}; expected a DeepSeek-V4 config") from None
    return {HEAD_PREFIX + name: shape for name, shape in shapes.items()}


def _outside(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    size, streams = config["hidden_size"], config["hc_mult"]
    shapes: dict[str, tuple[int, ...]] = {"e_proj.weight": (size, size)}
    shapes["h_proj.weight"] = (size, size)
    for norm in ("enorm", "hnorm", "norm", "attn_norm", "ffn_norm"):
        shapes[f"{norm}.weight"] = (size,)
    mixes = (2 + streams) * streams  # one row in, one out, and a square of streams
    for block in ("attn", "ffn"):
        shapes[f"hc_{block}_fn"] = (mixes, streams * size)
        shapes[f"hc_{block}_base"] = (mixes,)
        shapes[f"hc_{block}_scale"] = (3,)
    shapes["hc_head_fn"] = (streams, streams * size)
    shapes["hc_head_base"] = (streams,)
    shapes["hc_head_scale"] = (1,)
    return shapes


def _attention(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    size, head_dim = config["hidden_size"], config["head_dim"]
    heads, q_rank = config["num_attention_heads"], config["q_lora_rank"]
    groups, o_rank = config["o_groups"], config["o_lora_rank"]
    return {
        "attn.attn_sink": (heads,),
        "attn.q_norm.weight": (q_rank,),
        "attn.kv_norm.weight": (head_dim,),
        "attn.wq_a.weight": (q_rank, size),
        "attn.wq_b.weight": (heads * head_dim, q_rank),
        "attn.wkv.weight": (head_dim, size),
        "attn.wo_a.weight": (groups * o_rank, heads * head_dim // groups),
        "attn.wo_b.weight": (size, groups * o_rank),
    }


def _feed_forward(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    size, inner = config["hidden_size"], config["moe_intermediate_size"]
    num_experts = config["n_routed_experts"]
    shapes: dict[str, tuple[int, ...]] = {
        "ffn.gate.weight": (num_experts, size),
        "ffn.gate.bias": (num_experts,),
    }
    widths = {f"experts.{e}": inner for e in range(num_experts)}
    widths["shared_experts"] = inner * config.get("n_shared_experts", 1)
    for name, width in widths.items():
        shapes[f"ffn.{name}.w1.weight"] = (width, size)
        shapes[f"ffn.{name}.w2.weight"] = (size, width)
        shapes[f"ffn.{name}.w3.weight"] = (width, size)
    return shapes


#: What the head has besides a decoder layer.
_OUTSIDE_LAYER = ("e_proj.", "h_proj.", "enorm.", "hnorm.", "norm.", "hc_head_")


def base_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return plain name -> shape of every decoded tensor of the base.

    A decoder layer has the tensors of the head's, and those of its compressor and indexer; the
    first `num_hash_layers` route by a table instead of a bias. Raises GraftError if the config
    lacks a dimension.
    """
    head = {name.removeprefix(HEAD_PREFIX): shape for name, shape in head_shapes(config).items()}
    layer = {name: s for name, s in head.items() if not name.startswith(_OUTSIDE_LAYER)}
    size, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("embed.weight", "head.weight"), (vocabulary, size)
    )
    shapes |= {name: head[name] for name in head if name.startswith(("norm.", "hc_head_"))}
    ratios = compress_ratios(config) or []
    for n in range(config["num_hidden_layers"]):
        own = dict(layer)
        if n < (config.get("num_hash_layers") or 0):
            del own["ffn.gate.bias"]
            own["ffn.gate.tid2eid"] = (vocabulary, config["num_experts_per_tok"])
        own |= _compression(config, ratios[n] if n < len(ratios) else 0)
        shapes |= {f"layers.{n}.{name}": shape for name, shape in own.items()}
    return shapes


def _compression(config: Mapping[str, Any], ratio: int) -> dict[str, tuple[int, ...]]:
    size, width = config["hidden_size"], config["head_dim"]
    if ratio <= 1:
        return {}
    shapes = _compressor("attn.compressor.", ratio, width, size)
    if ratio == 4:
        index = config["index_head_dim"]
        shapes |= _compressor("attn.indexer.compressor.", ratio, index, size)
        heads = config["index_n_heads"]
        shapes["attn.indexer.weights_proj.weight"] = (heads, size)
        shapes["attn.indexer.wq_b.weight"] = (heads * index, config["q_lora_rank"])
    return shapes


def _compressor(prefix: str, ratio: int, width: int, size: int) -> dict[str, tuple[int, ...]]:
    wide = 2 * width if ratio == 4 else width  # windows overlap by half at ratio 4
    return {
        f"{prefix}ape": (ratio, wide),
        f"{prefix}norm.weight": (width,),
        f"{prefix}wgate.weight": (wide, size),
        f"{prefix}wkv.weight": (wide, size),
    }


# As a checkpoint stores them


def stored_as(name: str, shape: tuple[int, ...], kind: str, group_size: int) -> dict[str, Tensor]:
    """Return the meta tensors that hold a decoded tensor of this name: int4, mxfp4, fp8 or plain.

    `group_size` is the inputs per INT4 scale. A matrix [O, I] has a scale a group or, in FP8, a
    block of 128 x 128.
    """
    stem = name.removesuffix(".weight")
    if kind == "plain" or len(shape) != 2:
        return {name: _meta(storage_dtype(name), *shape)}
    outputs, inputs = shape
    if kind == "fp8":
        blocks = [-(-size // fp8_block.BLOCK) for size in shape]
        scale = _meta(torch.bfloat16, *blocks)
        return {name: _meta(torch.float8_e4m3fn, *shape), f"{stem}.weight_scale": scale}
    if kind == "mxfp4":
        return {
            f"{stem}.weight_packed": _meta(torch.uint8, outputs, inputs // 2),
            f"{stem}.weight_scale": _meta(torch.uint8, outputs, inputs // mxfp4.GROUP),
        }
    return {
        f"{stem}.weight_packed": _meta(torch.int32, outputs, inputs // 8),
        f"{stem}.weight_scale": _meta(torch.bfloat16, outputs, inputs // group_size),
        f"{stem}.weight_shape": _meta(torch.int64, 2),
    }


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
