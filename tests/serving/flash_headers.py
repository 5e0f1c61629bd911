"""DeepSeek-V4-Flash in W4A16-FP8 with its head, as headers: 69,000 meta tensors and a config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_graft.checkpoint.quantization_config import add_head, base_quantization_config
from mtp_graft.dsv4.head_shapes import head_shapes
from mtp_graft.dsv4.names import FP8_LINEAR, storage_dtype
from mtp_graft.serving.doctor.expected import base_shapes
from mtp_graft.serving.doctor.survey import Survey

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_nextn_predict_layers": 1,
    "num_hash_layers": 3,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "head_dim": 512,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "hc_mult": 4,
    "sliding_window": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 2**20,
    "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
}


def flash() -> Survey:
    quantization = add_head(base_quantization_config(), 43, "int4", "base")
    config = {**CONFIG, "quantization_config": quantization}
    tensors: dict[str, Tensor] = {}
    for name, shape in (base_shapes(config) | head_shapes(config)).items():
        tensors.update(stored(name, shape))
    index = dict.fromkeys(tensors, "model.safetensors")
    return Survey(Path("flash"), config, index, {"model.safetensors": tensors}, {})


def stored(name: str, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
    def meta(dtype: torch.dtype, *sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    stem = name.removesuffix(".weight")
    if ".experts." in name:
        rows, inputs = shape
        return {
            f"{stem}.weight_packed": meta(torch.int32, rows, inputs // 8),
            f"{stem}.weight_scale": meta(torch.bfloat16, rows, inputs // 128),
            f"{stem}.weight_shape": meta(torch.int64, 2),
        }
    if FP8_LINEAR.search(name) or name in ("mtp.0.e_proj.weight", "mtp.0.h_proj.weight"):
        blocks = [-(-n // 128) for n in shape]
        return {
            name: meta(torch.float8_e4m3fn, *shape),
            f"{stem}.weight_scale": meta(torch.bfloat16, *blocks),
        }
    return {name: meta(storage_dtype(name), *shape)}
