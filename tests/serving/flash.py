"""A stand-in of DeepSeek-V4-Flash in W4A16-FP8 with its head: real names and shapes, no bytes.

The shards are sparse files, so the folder is 146 GiB long and takes some 15 MB of a disk. The
experts' `weight_shape` (16 bytes each) is left out.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from mtp_graft.checkpoint.quantization_config import base_quantization_config
from mtp_graft.serving.memory import weights_bytes_per_rank

SIZE, INNER, HEADS, HEAD_DIM = 4096, 2048, 64, 512
Q_RANK, O_GROUPS, O_RANK = 1024, 8, 1024
EXPERTS, TOP_K, LAYERS, VOCAB, STREAMS = 256, 6, 43, 129280, 4
INDEX_HEADS, INDEX_DIM = 64, 128
HASH_LAYERS = 3
RATIOS = [0, 0, *([4, 128] * 20), 4, 0]
BYTES = {"F32": 4, "I32": 4, "I64": 8, "BF16": 2, "F8_E4M3": 1}

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "hidden_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "qk_rope_head_dim": 64,
    "q_lora_rank": Q_RANK,
    "o_groups": O_GROUPS,
    "o_lora_rank": O_RANK,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": INNER,
    "hc_mult": STREAMS,
    "index_n_heads": INDEX_HEADS,
    "index_head_dim": INDEX_DIM,
    "index_topk": 512,
    "sliding_window": 128,
    "max_position_embeddings": 1048576,
    "vocab_size": VOCAB,
    "compress_ratios": RATIOS,
}

#: Reads the 70,000 headers of a folder once.
cached_weights = cache(weights_bytes_per_rank)

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


def fp8(name: str, out: int, inputs: int) -> Tensors:
    scale = (-(-out // 128), -(-inputs // 128))
    return {f"{name}.weight": ("F8_E4M3", (out, inputs)), f"{name}.weight_scale": ("BF16", scale)}


def int4(name: str, out: int, inputs: int) -> Tensors:
    return {
        f"{name}.weight_packed": ("I32", (out, inputs // 8)),
        f"{name}.weight_scale": ("BF16", (out, inputs // 128)),
    }


def bf16(name: str, *shape: int) -> Tensors:
    return {f"{name}.weight": ("BF16", shape)}


def compressor(name: str, ratio: int, dim: int) -> Tensors:
    wide = dim * (2 if ratio == 4 else 1)
    return {
        f"{name}.ape": ("F32", (ratio, wide)),
        **bf16(f"{name}.wkv", wide, SIZE),
        **bf16(f"{name}.wgate", wide, SIZE),
        **bf16(f"{name}.norm", dim),
    }


def attention(name: str, ratio: int) -> Tensors:
    tensors: Tensors = {
        f"{name}.attn_sink": ("F32", (HEADS,)),
        **fp8(f"{name}.wq_a", Q_RANK, SIZE),
        **bf16(f"{name}.q_norm", Q_RANK),
        **fp8(f"{name}.wq_b", HEADS * HEAD_DIM, Q_RANK),
        **fp8(f"{name}.wkv", HEAD_DIM, SIZE),
        **bf16(f"{name}.kv_norm", HEAD_DIM),
        **fp8(f"{name}.wo_a", O_GROUPS * O_RANK, HEADS * HEAD_DIM // O_GROUPS),
        **fp8(f"{name}.wo_b", SIZE, O_GROUPS * O_RANK),
    }
    if ratio:
        tensors |= compressor(f"{name}.compressor", ratio, HEAD_DIM)
    if ratio == 4:
        tensors |= compressor(f"{name}.indexer.compressor", ratio, INDEX_DIM)
        tensors |= fp8(f"{name}.indexer.wq_b", INDEX_HEADS * INDEX_DIM, Q_RANK)
        tensors |= bf16(f"{name}.indexer.weights_proj", INDEX_HEADS, SIZE)
    return tensors


def mixing(name: str, rows: int, scales: int) -> Tensors:
    return {
        f"{name}_fn": ("F32", (rows, STREAMS * SIZE)),
        f"{name}_base": ("F32", (rows,)),
        f"{name}_scale": ("F32", (scales,)),
    }


def layer(name: str, ratio: int, hashed: bool = False) -> Tensors:
    gate = f"{name}.ffn.gate"
    router: Tensors = (
        {f"{gate}.tid2eid": ("I32", (VOCAB, TOP_K))}
        if hashed
        else {f"{gate}.bias": ("F32", (EXPERTS,))}
    )
    tensors = {**attention(f"{name}.attn", ratio), **bf16(gate, EXPERTS, SIZE), **router}
    for expert in range(EXPERTS):
        for w, out, inputs in (("w1", INNER, SIZE), ("w3", INNER, SIZE), ("w2", SIZE, INNER)):
            tensors |= int4(f"{name}.ffn.experts.{expert}.{w}", out, inputs)
    for w, out, inputs in (("w1", INNER, SIZE), ("w3", INNER, SIZE), ("w2", SIZE, INNER)):
        tensors |= bf16(f"{name}.ffn.shared_experts.{w}", out, inputs)
    for norm in ("attn_norm", "ffn_norm"):
        tensors |= bf16(f"{name}.{norm}", SIZE)
    for block in ("attn", "ffn"):
        tensors |= mixing(f"{name}.hc_{block}", (2 + STREAMS) * STREAMS, 3)
    return tensors


def head() -> Tensors:
    tensors = layer("mtp.0", 0) | mixing("mtp.0.hc_head", STREAMS, 1)
    for projection in ("e_proj", "h_proj"):
        tensors |= bf16(f"mtp.0.{projection}", SIZE, SIZE)
    for norm in ("enorm", "hnorm", "norm"):
        tensors |= bf16(f"mtp.0.{norm}", SIZE)
    return tensors


def around() -> Tensors:
    return {
        **bf16("embed", VOCAB, SIZE),
        **bf16("head", VOCAB, SIZE),
        **bf16("norm", SIZE),
        **mixing("hc_head", STREAMS, 1),
    }


def write_shard(file: Path, tensors: Tensors) -> None:
    entries, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + at)


def write_flash(folder: Path) -> Path:
    """Write the stand-in and return its folder."""
    folder.mkdir(parents=True)
    config = {**CONFIG, "quantization_config": base_quantization_config()}
    (folder / "config.json").write_text(json.dumps(config))
    # A shard a layer: reading a header maps the whole file.
    shards = {"model-around.safetensors": around(), "model-mtp-w4a16.safetensors": head()}
    for number, ratio in enumerate(RATIOS[:LAYERS]):
        name = f"layers.{number}"
        shards[f"model-{name}.safetensors"] = layer(name, ratio, number < HASH_LAYERS)
    weight_map = {}
    for shard, tensors in shards.items():
        write_shard(folder / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
