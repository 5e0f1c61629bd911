"""Tensor names and shapes: which tensors base and head have, by the model's config.

DeepSeek's names (`layers.N.attn.wq_a.weight`, `mtp.0.e_proj.weight`, ...) are used everywhere here,
and are translated from transformers', which its modules have.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mtp_graft.dsv4.config import (
    Dimensions,
    DSparkDimensions,
    check_dimensions,
    check_keys,
    compress_ratios,
    num_stages,
)
from mtp_graft.errors import GraftError

Shapes = dict[str, tuple[int, ...]]  # by plain name

HEAD_PREFIX = "mtp.0."
#: Copies of the target's, for which vLLM's drafter has rules on GPUs.
HEAD_COPIES = {"mtp.0.head.weight", "mtp.0.emb.tok_emb.weight"}

#: Modules that vLLM builds as the config says.
QUANTIZED = re.compile(
    r"^(layers|mtp)\.\d+\.((e|h|main)_proj|attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)"
    r"|ffn\.(shared_experts|experts\.\d+)\.w[123])$"
)
#: Of those that it builds without, whatever the config says, those that the plugin decodes.
NEVER_QUANTIZED = re.compile(
    r"\.attn\.(indexer\.)?compressor\.|\.attn\.indexer\.weights_proj(\.|$)"
)
#: Routed experts' matrices, the modules and their weights.
EXPERT = re.compile(r"^.+\.ffn\.experts\.\d+\.w[123](\.weight)?$")
#: Parameters that lose routing or mixing precision in BF16 and stay in float32.
FLOAT32 = re.compile(r"(\.|^)(hc_\w+|attn_sink|ape)$|\.gate\.bias$")

# (transformers, DeepSeek), applied in this order to the dotted name.
_RENAMES = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"\.self_attn\.compressor\.indexer\.scorer\.weights_proj\.", ".attn.indexer.weights_proj."),
    (r"\.self_attn\.compressor\.indexer\.q_b_proj\.", ".attn.indexer.wq_b."),
    (r"\.self_attn\.compressor\.indexer\.", ".attn.indexer.compressor."),
    (r"\.self_attn\.", ".attn."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
    (r"\.position_bias$", ".ape"),
    (r"\.([qo])_([ab])_proj\.", r".w\1_\2."),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.sinks$", ".attn_sink"),
    (r"\.mlp\.", ".ffn."),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"experts(\.\d+)?\.gate_proj\.", r"experts\1.w1."),
    (r"experts(\.\d+)?\.up_proj\.", r"experts\1.w3."),
    (r"experts(\.\d+)?\.down_proj\.", r"experts\1.w2."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.(attn|ffn)_hc\.(\w+)$", r".hc_\1_\2"),
    (r"(^|\.)hc_head\.hc_(\w+)$", r"\1hc_head_\2"),
)
#: A stage's parameters in an `MTPHead`, which has one, and in a `DSpark`.
OF_STAGE = re.compile(r"^(?:layer|stages\.(\d+))\.")
_RENAMED = re.compile("|".join(pattern for pattern, _ in _RENAMES))


def from_transformers(name: str) -> str:
    """Return DeepSeek's name for a transformers `deepseek_v4` parameter (fused experts apart)."""
    for pattern, target in _RENAMES if _RENAMED.search(name) else ():  # most names of a base are
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


def head_from_module(state: Mapping[str, Tensor], stages: int = 1) -> dict[str, Tensor]:
    """Rename the state dict of an `MTPHead`, or of a `DSpark` of `stages`, to `mtp.*`.

    Experts are split. What leads into the first stage is its, what leads out is the last one's.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        of_stage = OF_STAGE.match(name)
        block = 0 if name.startswith("main_") else stages - 1
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
    """Return the drafter among `found`, the names of the tensors of the checkpoint at `where`.

    Raises GraftError if there are none, and for blocks that are no drafter's.
    """
    names = sorted(name for name in found if name.startswith("mtp."))
    if not names:
        raise GraftError(f"{where}: has no mtp.* tensors; expected an upstream with one")
    blocks = {name.split(".")[1] for name in names}
    is_dspark = any(name.startswith(f"{HEAD_PREFIX}main_proj.") for name in names)
    if blocks != {str(n) for n in range(len(blocks) if is_dspark else 1)}:
        listed = ",".join(sorted(blocks))
        raise GraftError(
            f"{where}: has blocks mtp.{{{listed}}}; expected mtp.0 alone, or a DSpark drafter's "
            "from mtp.0 on, with mtp.0.main_proj; a shard may be missing from the index"
        )
    return Drafter("dspark" if is_dspark else "mtp", len(blocks), names)


def served_as(module: str, num_layers: int) -> str:
    """Return the name by which vLLM asks for the scheme of one of a drafter's modules.

    Its blocks are layers after the base's `num_layers`. DSpark's `wkv` is asked for a second time,
    those of all stages as `model.context_wkv_proj`.
    """
    _, block, name = module.split(".", 2)
    within = "" if name == "main_proj" else f"layers.{num_layers + int(block)}."
    return f"model.{within}{name}"


def storage_dtype(name: str) -> torch.dtype:
    """Return the dtype that an unquantized tensor of this name is stored in."""
    if name.endswith(".tid2eid"):
        return torch.int32
    return torch.float32 if FLOAT32.search(name) else torch.bfloat16


# Decoded shapes: of one decoder layer and what goes around it; base and head are put together


def head_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shape of every decoded tensor of the drafter that config.json describes.

    MTP's has 797 for Flash. Raises GraftError if the config lacks one of the dimensions.
    """
    if stages := num_stages(config):
        return dspark_shapes(config, stages)
    c = check_dimensions(config)
    size = c.hidden_size
    projections: Shapes = {"e_proj.weight": (size, size), "h_proj.weight": (size, size)}
    norms: Shapes = {"enorm.weight": (size,), "hnorm.weight": (size,)}
    head = projections | norms | _output(c) | _layer(c)
    return {HEAD_PREFIX + name: shape for name, shape in head.items()}


def dspark_shapes(config: Mapping[str, Any], stages: int) -> Shapes:
    """Return the shape of every decoded tensor of a DSpark drafter: 2,376 of them for Flash.

    `config` has upstream's `dspark_*` keys. Raises GraftError if it lacks one of the dimensions.
    """
    c = check_keys(DSparkDimensions, config)
    size, rank, taps = c.hidden_size, c.dspark_markov_rank, len(c.dspark_target_layer_ids)
    into: Shapes = {"main_proj.weight": (size, taps * size), "main_norm.weight": (size,)}
    out = _output(c) | {
        "markov_head.markov_w1.weight": (c.vocab_size, rank),
        "markov_head.markov_w2.weight": (c.vocab_size, rank),
        "confidence_head.proj.weight": (1, size + rank),
    }
    blocks = [_layer(c) for _ in range(stages)]
    blocks[0], blocks[-1] = into | blocks[0], blocks[-1] | out
    return {f"mtp.{s}.{name}": shape for s, b in enumerate(blocks) for name, shape in b.items()}


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
    widths["shared_experts"] = c.moe_intermediate_size * c.n_shared_experts
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
