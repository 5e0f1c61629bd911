"""Replay: what the MTP head does on sequences that the base has already computed.

All that the server computes is there, but for the KV cache's FP8 rounding.

Shapes: B sequences, T tokens of each, R = T - 1 that the head reads (the last has no successor
whose embedding it could read), S streams, D hidden size, K experts a token, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from mtp_graft.dsv4.dspark import DSpark
from mtp_graft.dsv4.head import MTPHead, one_layer_config
from mtp_graft.dsv4.names import head_from_module
from mtp_graft.errors import GraftError

Module = TypeVar("Module", MTPHead, DSpark)


class RoutingRecorder(nn.Module):
    """Stand in for the routed experts: keep what they are given, add nothing."""

    routed: tuple[Tensor, Tensor]

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Keep the input `x` [R, D] and the chosen `experts` [R, K]."""
        self.routed = x, experts.sort(dim=-1).values
        return torch.zeros_like(x)


def model_config(settings: Mapping[str, Any]) -> DeepseekV4Config:
    """Return transformers' configuration for a checkpoint's config.json."""
    left_out = ("quantization_config", "architectures")
    return DeepseekV4Config(**{k: v for k, v in settings.items() if k not in left_out})


def build_head(
    config: DeepseekV4Config,
    tensors: Mapping[str, Tensor],
    *,
    with_experts: bool = True,
    device: str = "cpu",
) -> MTPHead:
    """Return the head with decoded `mtp.0.*` weights, as `variants.decode_head` gives them.

    They are all of them, of the right shapes. Without experts, a `RoutingRecorder` takes their
    place.
    """
    with torch.device("meta"):  # the weights are given: none is initialized
        head = MTPHead(config).eval()
    if not with_experts:
        head.layer.mlp.experts = RoutingRecorder()
    return _fill(head, config, tensors, 1, device)


def build_dspark(
    config: DeepseekV4Config, tensors: Mapping[str, Tensor], stages: int, *, device: str = "cpu"
) -> DSpark:
    """Return a DSpark drafter of `stages` likewise; `config` has upstream's `dspark_*` keys."""
    with torch.device("meta"):
        drafter = DSpark(config, stages).eval()
    return _fill(drafter, config, tensors, stages, device)


def _fill(
    module: Module,
    config: DeepseekV4Config,
    tensors: Mapping[str, Tensor],
    stages: int,
    device: str,
) -> Module:
    module.to_empty(device=device)
    module.rotary_emb = DeepseekV4RotaryEmbedding(one_layer_config(config)).to(device)
    # DeepSeek's tensors are views of the module's fused ones, so copying fills these.
    for name, view in head_from_module(module.state_dict(), stages).items():
        view.copy_(tensors[name])
    return module


@torch.inference_mode()
def replay_routing(head: MTPHead, residual: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the routed experts' inputs [R, D] and the router's choices int64 [R, K], ascending.

    `head` was built without experts; `residual` [T, S, D] and `embeds` [T, D] are those of the
    tokens themselves. Raises GraftError if the head gives values that are not finite.
    """
    recorder = head.layer.mlp.experts
    assert isinstance(recorder, RoutingRecorder)
    next(unroll(head, residual[None], embeds[None], 1))
    return recorder.routed


@torch.inference_mode()
def replay_drafts(
    head: MTPHead, lm_head: Tensor, residual: Tensor, embeds: Tensor, start: int = 0, k: int = 1
) -> Tensor:
    """Return the k drafts int64 [B, R - start, k] of the step after each token from `start` on.

    The drafts of token i's step are the guesses at tokens i + 2, i + 3 and so on, each as if those
    before it were right; beyond the text they mean nothing. `lm_head` [V, D] is the base's, in the
    head's dtype; `residual` [B, T, S, D] and `embeds` [B, T, D] are those of the tokens themselves.
    Raises GraftError as `replay_routing`.
    """
    streams = unroll(head, residual, embeds, k)
    logits = (head.logits(stream[:, start:], lm_head) for stream in streams)  # [B, R - start, V]
    return torch.stack([each.argmax(dim=-1) for each in logits], dim=-1)


def unroll(
    head: MTPHead, residual: Tensor, embeds: Tensor, k: int, *, recompute: bool = False
) -> Iterator[Tensor]:
    """Yield the head's stream [B, R, S, D] for each of k drafts, as a server makes them.

    `residual` is [B, T, S, D], `embeds` [B, T, D]. At token i the first draft reads token i + 1's
    embedding, and each further one the stream of the draft before and the next token's. A backward
    pass finds the activations in memory, or computes them again.
    """

    def step(*given: Tensor) -> tuple[Tensor, Tensor]:
        stream, following, positions, *seen = given
        return head(stream, following, positions, seen), seen[-1]

    like, keys = head.h_proj.weight, list[Tensor]()
    stream = residual[:, :-1].to(like)
    positions = torch.arange(stream.shape[1], device=like.device)[None]
    for draft in range(k):
        following = F.pad(embeds[:, 1 + draft :].to(like), (0, 0, 0, draft))  # 0 past the end
        given = stream, following, positions + draft, *keys
        stream, key = checkpoint(step, *given, use_reentrant=False) if recompute else step(*given)
        keys.append(key)
        if not torch.isfinite(stream).all():
            raise GraftError(
                "mtp.0: gives values that are not finite on a captured residual that is; check "
                "that upstream and base are of the same model, or fetch the head again"
            )
        yield stream
