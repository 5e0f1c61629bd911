"""Which tensors the one-block head has, and their logical shapes, from the model's config.

Shape legend: D hidden, S hyper-connection streams, E routed experts, M expert inputs of w2.
"""

from collections.abc import Mapping
from typing import Any

from mtp_graft.dsv4.names import HEAD_PREFIX
from mtp_graft.errors import GraftError


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
