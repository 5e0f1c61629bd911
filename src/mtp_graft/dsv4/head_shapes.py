"""Which tensors base and head have: their logical shapes by the model's config, and as stored.

The functions below describe one decoder layer and what goes around it; base and head are put
together from them.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mtp_graft.dsv4.config import Dimensions, check_dimensions, compress_ratios
from mtp_graft.dsv4.names import HEAD_PREFIX, storage_dtype
from mtp_graft.quant import fp8_block, int4, mxfp4

Shapes = dict[str, tuple[int, ...]]  # by plain name
Format = Literal["plain", "fp8", "mxfp4", "int4"]


def head_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shape of every decoded tensor of the head: 797 of them for Flash.

    Raises GraftError if the config lacks one of the dimensions.
    """
    c = check_dimensions(config)
    size = c.hidden_size
    projections: Shapes = {"e_proj.weight": (size, size), "h_proj.weight": (size, size)}
    norms: Shapes = {"enorm.weight": (size,), "hnorm.weight": (size,)}
    head = projections | norms | _output(c) | _layer(c)
    return {HEAD_PREFIX + name: shape for name, shape in head.items()}


def base_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shape of every decoded tensor of the base.

    The first `num_hash_layers` route by a table instead of a bias. Raises GraftError if the config
    lacks a dimension.
    """
    c = check_dimensions(config)
    vocabulary = (c.vocab_size, c.hidden_size)
    shapes: Shapes = {"embed.weight": vocabulary, "head.weight": vocabulary} | _output(c)
    ratios = compress_ratios(config) or []
    for n in range(c.num_hidden_layers):
        layer = _layer(c) | _compression(c, ratios[n] if n < len(ratios) else 0)
        if n < (c.num_hash_layers or 0):
            del layer["ffn.gate.bias"]
            layer["ffn.gate.tid2eid"] = (c.vocab_size, c.num_experts_per_tok)
        shapes |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    return shapes


def _output(c: Dimensions) -> Shapes:
    """Return what leads from the hyper-connection streams to the LM head."""
    streams, size = c.hc_mult, c.hidden_size
    return {
        "norm.weight": (size,),
        "hc_head_fn": (streams, streams * size),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
    }


def _layer(c: Dimensions) -> Shapes:
    """Return a layer without compression: attention, feed-forward, and what leads in and out."""
    size, streams, num_experts = c.hidden_size, c.hc_mult, c.n_routed_experts
    heads, low_rank = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    shapes: Shapes = {
        "attn.attn_sink": (c.num_attention_heads,),
        "attn.q_norm.weight": (c.q_lora_rank,),
        "attn.kv_norm.weight": (c.head_dim,),
        "attn.wq_a.weight": (c.q_lora_rank, size),
        "attn.wq_b.weight": (heads, c.q_lora_rank),
        "attn.wkv.weight": (c.head_dim, size),
        "attn.wo_a.weight": (low_rank, heads // c.o_groups),
        "attn.wo_b.weight": (size, low_rank),
        "ffn.gate.weight": (num_experts, size),
        "ffn.gate.bias": (num_experts,),
    }
    widths = {f"experts.{e}": c.moe_intermediate_size for e in range(num_experts)}
    widths["shared_experts"] = c.moe_intermediate_size * (c.n_shared_experts or 1)
    for name, width in widths.items():
        shapes[f"ffn.{name}.w1.weight"] = (width, size)
        shapes[f"ffn.{name}.w2.weight"] = (size, width)
        shapes[f"ffn.{name}.w3.weight"] = (width, size)
    mixes = (2 + streams) * streams  # of hyper-connections: streams in, streams out, both
    for block in ("attn", "ffn"):
        shapes[f"{block}_norm.weight"] = (size,)
        shapes[f"hc_{block}_fn"] = (mixes, streams * size)
        shapes[f"hc_{block}_base"] = (mixes,)
        shapes[f"hc_{block}_scale"] = (3,)
    return shapes


def _compression(c: Dimensions, ratio: int) -> Shapes:
    if ratio <= 1:
        return {}
    shapes = _compressor(c, "attn.compressor.", ratio, c.head_dim)
    if ratio == 4:
        heads, width = c.index_n_heads, c.index_head_dim
        shapes |= _compressor(c, "attn.indexer.compressor.", ratio, width)
        shapes["attn.indexer.weights_proj.weight"] = (heads, c.hidden_size)
        shapes["attn.indexer.wq_b.weight"] = (heads * width, c.q_lora_rank)
    return shapes


def _compressor(c: Dimensions, prefix: str, ratio: int, width: int) -> Shapes:
    wide = 2 * width if ratio == 4 else width  # windows overlap by half at ratio 4
    return {
        f"{prefix}ape": (ratio, wide),
        f"{prefix}norm.weight": (width,),
        f"{prefix}wgate.weight": (wide, c.hidden_size),
        f"{prefix}wkv.weight": (wide, c.hidden_size),
    }


def stored_as(name: str, shape: tuple[int, ...], kind: str, group_size: int) -> dict[str, Tensor]:
    """Return the meta tensors in which a checkpoint stores a decoded tensor of this name.

    `kind` is a `Format`. A matrix [O, I] has a scale for `group_size` inputs (INT4), 32 inputs
    (MXFP4) or a block of 128 x 128 (FP8). Anything but a matrix is plain.
    """
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"": (storage_dtype(name), shape)}
    if kind != "plain" and len(shape) == 2:
        outputs, inputs = shape
        parts = {
            "_packed": (torch.int32, (outputs, inputs // int4.CODES_PER_WORD)),
            "_scale": (torch.bfloat16, (outputs, inputs // group_size)),
            "_shape": (torch.int64, (2,)),
        }
        if kind == "mxfp4":
            codes, scale = (outputs, inputs // 2), (outputs, inputs // mxfp4.GROUP)
            parts = {"_packed": (torch.uint8, codes), "_scale": (torch.uint8, scale)}
        if kind == "fp8":
            blocks = tuple(-(-size // fp8_block.BLOCK) for size in shape)
            parts = {"": (torch.float8_e4m3fn, shape), "_scale": (torch.bfloat16, blocks)}
    return {
        f"{name}{part}": torch.empty(size, dtype=dtype, device="meta")
        for part, (dtype, size) in parts.items()
    }
