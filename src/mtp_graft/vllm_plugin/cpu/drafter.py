"""Gap: vLLM's CPU path raises NotImplementedError for MTP and drops `mtp.*`; this is the drafter.

The modules and their names follow vLLM's CUDA drafter, so that its proposer finds what it shares
with the target (embedding and LM head) and asks the quantization config for the same names:
`model.layers.{num_hidden_layers}.{e_proj,h_proj,attn.*,ffn.*}`.

Shapes: T tokens, S hyper-connection streams (4), D hidden size.
"""

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mhc import HCHeadOp
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.deepseek_mtp import SharedHead
from vllm.models.deepseek_v4.cpu.model import DeepseekV4DecoderLayer
from vllm.sequence import IntermediateTensors

from mtp_graft.vllm_plugin import draft_steps
from mtp_graft.vllm_plugin.cpu.dequantize import dequantize_on_load
from mtp_graft.vllm_plugin.cpu.hyper_connections import compute_rowwise
from mtp_graft.vllm_plugin.cpu.order_free import free_from_order
from mtp_graft.vllm_plugin.cpu.output_projection import project_rowwise
from mtp_graft.vllm_plugin.strict_loading import load_strictly

#: Parts of fused parameters: checkpoint name, parameter name, position.
_FUSED = (
    (".attn.wq_a.", ".attn.fused_wqa_wkv.", 0),
    (".attn.wkv.", ".attn.fused_wqa_wkv.", 1),
    (".shared_experts.w1.", ".shared_experts.gate_up_proj.", 0),
    (".shared_experts.w3.", ".shared_experts.gate_up_proj.", 1),
)
_OUTSIDE_BLOCK = re.compile(r"^(enorm|hnorm|e_proj|h_proj|hc_head_\w+)(\.|$)")


def _projection(vllm_config: VllmConfig, size: int, prefix: str) -> ReplicatedLinear:
    quant_config = vllm_config.quant_config
    return ReplicatedLinear(
        size, size, bias=False, return_bias=False, quant_config=quant_config, prefix=prefix
    )


class MTPLayer(nn.Module):
    """One head: projections of residual and embedding, a decoder layer, and what logits need."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.config = config
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.e_proj = _projection(vllm_config, config.hidden_size, f"{prefix}.e_proj")
        self.h_proj = _projection(vllm_config, config.hidden_size, f"{prefix}.h_proj")
        streams, width = config.hc_mult, config.hc_mult * config.hidden_size
        for name, shape in (("fn", (streams, width)), ("base", (streams,)), ("scale", (1,))):
            parameter = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
            self.register_parameter(f"hc_head_{name}", parameter)
        self.hc_head = HCHeadOp()
        self.shared_head = SharedHead(
            config=config, prefix=prefix, quant_config=vllm_config.quant_config
        )
        topk_indices = torch.empty(
            vllm_config.scheduler_config.max_num_batched_tokens,
            config.index_topk,
            dtype=torch.int32,
        )
        self.mtp_block = DeepseekV4DecoderLayer(
            vllm_config, prefix, topk_indices_buffer=topk_indices
        )

    def forward(
        self, input_ids: Tensor, positions: Tensor, residual: Tensor, embeds: Tensor
    ) -> Tensor:
        """Return the head's own residual stream, flat [T, S*D].

        `residual` [T, S*D] is the target's before hc_head, `embeds` [T, D] the embedding of the
        next token, `positions` [T] the residual's position; at position 0 the embedding is zero.
        """
        streams = residual.view(-1, self.config.hc_mult, self.config.hidden_size)  # [T, S, D]
        embeds = embeds.masked_fill(positions.unsqueeze(-1) == 0, 0)
        x = self.h_proj(self.hnorm(streams)) + self.e_proj(self.enorm(embeds)).unsqueeze(-2)
        x, residual, post, comb = self.mtp_block(x=x, positions=positions, input_ids=input_ids)
        if self.mtp_block.use_fused_mhc:
            x = self.mtp_block.hc_post(x, residual, post, comb)
        return x.flatten(1)

    def collapse(self, streams: Tensor) -> Tensor:
        """Return the normalized state [T, D] that the LM head reads, from [T, S*D]."""
        collapsed = self.hc_head(
            streams.view(-1, self.config.hc_mult, self.config.hidden_size),
            self.hc_head_fn,
            self.hc_head_scale,
            self.hc_head_base,
            self.config.rms_norm_eps,
            self.config.hc_eps,
        )
        return self.shared_head.norm(collapsed)


class MultiTokenPredictor(nn.Module):
    """The head as vLLM's proposer expects it: `layers` by index, `embed_tokens` to be shared."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.layer_index = str(config.num_hidden_layers)
        layer = MTPLayer(vllm_config, f"{prefix}.layers.{self.layer_index}")
        self.layers = nn.ModuleDict({self.layer_index: layer})
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @property
    def layer(self) -> MTPLayer:
        """The one head; every speculative step runs it again on its own output."""
        return cast(MTPLayer, self.layers[self.layer_index])


class DeepSeekV4MTP(nn.Module):
    """The MTP drafter of DeepSeek-V4 on a CPU."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        draft_steps.apply()
        vllm_config.quant_config = dequantize_on_load(vllm_config.quant_config)
        self.config = vllm_config.model_config.hf_config
        inner = f"{prefix}.model" if prefix else "model"
        self.model = MultiTokenPredictor(vllm_config=vllm_config, prefix=inner)
        compute_rowwise(self)
        project_rowwise(self)
        free_from_order(self)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [T, D] of token ids [T]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor:
        """Run the head on `hidden_states` [T, S*D] and the following tokens `input_ids` [T]."""
        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model.layer(input_ids, positions, hidden_states, embeds)

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor | None:
        """Return the logits [T, vocabulary] of the token after the following one."""
        layer = self.model.layer
        return self.model.logits_processor(layer.shared_head.head, layer.collapse(hidden_states))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load `mtp.0.*`; GraftError names any tensor left over and any parameter left empty."""
        head = ((name, tensor) for name, tensor in weights if name.startswith("mtp."))
        prefix = f"model.layers.{self.model.layer_index}"
        shared = {"model.embed_tokens.weight", f"{prefix}.shared_head.head.weight"}
        return load_strictly(self, head, self._load, shared)

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        parameters: dict[str, Any] = dict(self.named_parameters())
        experts = _expert_parameters(self)
        loaded = set()
        for name, tensor in weights:
            target = f"model.layers.{self.model.layer_index}.{_module_name(name)}"
            if ".ffn.experts." in target:
                loaded |= _load_expert(parameters, experts, target, tensor)
                continue
            position = None
            for part, fused, index in _FUSED:
                if part in target:
                    target, position = target.replace(part, fused), index
            if target not in parameters:
                continue  # strict loading reports it
            parameter = parameters[target]
            if target.endswith(".attn_sink"):
                _load_sinks(parameter, tensor)
            elif position is not None:
                parameter.weight_loader(parameter, tensor, position)
            else:
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            loaded.add(target)
        return loaded


def _module_name(name: str) -> str:
    """Return the layer-relative parameter path of a checkpoint name `mtp.0.*`."""
    inner = name.removeprefix("mtp.0.")
    if _OUTSIDE_BLOCK.match(inner):
        return inner
    if inner == "norm.weight":
        return "shared_head.norm.weight"
    inner = inner.replace("ffn.gate.bias", "ffn.gate.e_score_correction_bias")
    return "mtp_block." + inner.replace(".shared_experts.w2.", ".shared_experts.down_proj.")


def _expert_parameters(model: "DeepSeekV4MTP") -> dict[str, tuple[str, int, str]]:
    """Return `experts.7.w1.` -> (parameter prefix, expert, matrix) for every expert matrix."""
    mapping = fused_moe_make_expert_params_mapping(
        model,
        ckpt_gate_proj_name="w1",
        ckpt_down_proj_name="w2",
        ckpt_up_proj_name="w3",
        num_experts=model.config.n_routed_experts,
    )
    return {part: (parameter, expert, matrix) for parameter, part, expert, matrix in mapping}


def _load_expert(
    parameters: dict[str, Any],
    experts: dict[str, tuple[str, int, str]],
    target: str,
    tensor: Tensor,
) -> set[str]:
    match = re.search(r"experts\.\d+\.w[123]\.", target)
    if match is None or match[0] not in experts:
        return set()
    parameter_name, expert, matrix = experts[match[0]]
    name = target.replace(match[0], parameter_name)
    if name not in parameters:
        return set()
    if tensor.dtype == torch.float8_e8m0fnu:
        tensor = tensor.view(torch.uint8)  # the exponent itself, not its value
    parameter = parameters[name]
    done = parameter.weight_loader(
        parameter, tensor, name, shard_id=matrix, expert_id=expert, return_success=True
    )
    return {name} if done else set()


def _load_sinks(parameter: nn.Parameter, sinks: Tensor) -> None:
    """Copy this rank's share of the attention sinks [heads]; padding stays at -inf."""
    heads = sinks.shape[0] // get_tensor_model_parallel_world_size()
    start = heads * get_tensor_model_parallel_rank()
    parameter.data[:heads].copy_(sinks[start : start + heads])
