"""Which tensors base and head have, and their decoded shapes, by the model's config.

The functions below describe one decoder layer and what goes around it; base and head are put
together from them.
"""

from collections.abc import Mapping
from typing import Any

from mtp_graft.dsv4.config import Dimensions, check_dimensions, compress_ratios
from mtp_graft.dsv4.names import HEAD_PREFIX

Shapes = dict[str, tuple[int, ...]]  # by plain name


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
    ratios, num_hashed = compress_ratios(config) or [], c.num_hash_layers
    if num_hashed is None:
        num_hashed = (c.mlp_layer_types or []).count("hash_moe")
    for n in range(c.num_hidden_layers):
        layer = _layer(c) | _compression(c, ratios[n] if n < len(ratios) else 0)
        if n < num_hashed:
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
    """Return the compressor of a layer's keys and, at ratio 4, the indexer with its own."""
    if ratio <= 1:
        return {}
    shapes, widths, overlap = Shapes(), {"attn.": c.head_dim}, 1
    if ratio == 4:
        widths["attn.indexer."], overlap = c.index_head_dim, 2  # windows overlap by half
        indexed = c.index_n_heads * c.index_head_dim
        shapes["attn.indexer.weights_proj.weight"] = (c.index_n_heads, c.hidden_size)
        shapes["attn.indexer.wq_b.weight"] = (indexed, c.q_lora_rank)
    for prefix, width in widths.items():
        shapes[f"{prefix}compressor.ape"] = (ratio, overlap * width)
        shapes[f"{prefix}compressor.norm.weight"] = (width,)
        shapes[f"{prefix}compressor.wgate.weight"] = (overlap * width, c.hidden_size)
        shapes[f"{prefix}compressor.wkv.weight"] = (overlap * width, c.hidden_size)
    return shapes
