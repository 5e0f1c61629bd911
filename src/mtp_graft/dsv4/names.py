"""Tensor names: DeepSeek's own (as in the checkpoints) and transformers' (as in its modules).

DeepSeek's (`layers.N.attn.wq_a.weight`, `mtp.0.e_proj.weight`, ...) are used everywhere here.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mtp_graft.errors import GraftError

HEAD_PREFIX = "mtp.0."
EXPERTS_PREFIX = f"{HEAD_PREFIX}ffn.experts."

#: Modules that vLLM builds without quantization, whatever the config says.
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


def head_from_module(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an `MTPHead` state dict (enorm, layer.*, hc_head.*) to `mtp.0.*`, experts split."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        inner = name.removeprefix("layer.")
        # A leading dot lets the layer patterns match at the start of the name.
        for native, part in split_experts(f".{inner}", tensor).items():
            renamed[HEAD_PREFIX + native.lstrip(".")] = part
    return renamed


def upstream_head_names(found: Iterable[str], where: object) -> list[str]:
    """Return the sorted `mtp.*` names among `found`, the tensors of the checkpoint at `where`.

    Raises GraftError if there are none, or blocks other than mtp.0.
    """
    head = sorted(name for name in found if name.startswith("mtp."))
    if not head:
        raise GraftError(f"{where}: has no mtp.* tensors; expected the upstream master's head")
    blocks = sorted({name.split(".")[1] for name in head})
    if blocks != ["0"]:
        raise GraftError(
            f"{where}: has blocks mtp.{{{','.join(blocks)}}}; expected mtp.0 alone. "
            "Three blocks are a DSpark drafter, another architecture"
        )
    return head


def storage_dtype(name: str) -> torch.dtype:
    """Return the dtype that an unquantized tensor of this name is stored in."""
    if name.endswith(".tid2eid"):
        return torch.int32
    return torch.float32 if FLOAT32.search(name) else torch.bfloat16
