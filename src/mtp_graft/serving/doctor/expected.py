"""Which tensors a checkpoint has to have, and their logical shapes, from its config."""

from collections.abc import Mapping
from typing import Any

from mtp_graft.dsv4.config import compress_ratios
from mtp_graft.dsv4.head_shapes import head_shapes
from mtp_graft.dsv4.names import HEAD_PREFIX

Shapes = dict[str, tuple[int, ...]]

#: What the head has besides a decoder layer.
_OUTSIDE_LAYER = ("e_proj.", "h_proj.", "enorm.", "hnorm.", "norm.", "hc_head_")


def base_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return plain name -> shape of every decoded tensor of the base.

    A decoder layer has the tensors of the head's, and those of its compressor and indexer; the
    first `num_hash_layers` route by a table instead of a bias. Raises GraftError if the config
    lacks a dimension.
    """
    head = {name.removeprefix(HEAD_PREFIX): shape for name, shape in head_shapes(config).items()}
    layer = {name: s for name, s in head.items() if not name.startswith(_OUTSIDE_LAYER)}
    size, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"embed.weight": (vocabulary, size), "head.weight": (vocabulary, size)}
    shapes |= {name: head[name] for name in head if name.startswith(("norm.", "hc_head_"))}
    ratios = compress_ratios(config) or []
    for n in range(config["num_hidden_layers"]):
        own = dict(layer)
        if n < config.get("num_hash_layers", 0):
            del own["ffn.gate.bias"]
            own["ffn.gate.tid2eid"] = (vocabulary, config["num_experts_per_tok"])
        own |= _compression(config, ratios[n] if n < len(ratios) else 0)
        shapes |= {f"layers.{n}.{name}": shape for name, shape in own.items()}
    return shapes


def _compression(config: Mapping[str, Any], ratio: int) -> Shapes:
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


def _compressor(prefix: str, ratio: int, width: int, size: int) -> Shapes:
    wide = 2 * width if ratio == 4 else width  # windows overlap by half at ratio 4
    return {
        f"{prefix}ape": (ratio, wide),
        f"{prefix}norm.weight": (width,),
        f"{prefix}wgate.weight": (wide, size),
        f"{prefix}wkv.weight": (wide, size),
    }
