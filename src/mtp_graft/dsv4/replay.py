"""Replay: what a drafter does on sequences that the base has already computed.

All that the server computes is there, but for its rounding: values to BF16, cached keys to FP8.

Shapes: B sequences, T tokens of each, R = T - 1 that the head reads (the last has no successor
whose embedding it could read), S streams, D hidden size, K experts a token, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.dsv4.dspark import DSpark, block_tokens
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.names import EXPERT, Weights, head_from_module
from mtp_graft.errors import GraftError

#: Anchors whose blocks are in memory at once.
_ANCHORS = 512
Module = TypeVar("Module", MTPHead, DSpark)


class RoutingRecorder(nn.Module):
    """Stand in for the routed experts: keep what they are given, add nothing."""

    routed: tuple[Tensor, Tensor, Tensor]

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Keep `x` [R, D], the `experts` [R, K] chosen for it, ascending, and their `weights`."""
        experts, order = experts.sort(dim=-1)
        self.routed = x, experts, weights.gather(-1, order)
        return torch.zeros_like(x)


def model_config(settings: Mapping[str, Any]) -> DeepseekV4Config:
    """Return transformers' configuration for a checkpoint's config.json."""
    left_out = ("quantization_config", "architectures")
    return DeepseekV4Config(**{k: v for k, v in settings.items() if k not in left_out})


def build_head(
    config: DeepseekV4Config, tensors: Weights, *, with_experts: bool = True, device: str = "cpu"
) -> MTPHead:
    """Return the head with `variants.decode_head`'s weights; a `RoutingRecorder` for no experts."""
    with torch.device("meta"):  # the weights are given: none is initialized
        head = MTPHead(config).eval()
    if not with_experts:
        head.layer.mlp.experts = RoutingRecorder()
    return _fill(head, tensors, 1, device)


def build_dspark(
    config: DeepseekV4Config,
    tensors: Weights,
    stages: int,
    *,
    recorded: int | None = None,
    device: str = "cpu",
) -> DSpark:
    """Return a DSpark drafter of `stages` likewise; `config` has upstream's `dspark_*` keys.

    On a GPU its experts are BF16, as in a server: 39 GB of Flash's. With `recorded` it ends with
    that stage, whose experts a `RoutingRecorder` stands in for; the ones before are to be filled.
    """
    with torch.device("meta"):
        drafter = DSpark(config, stages).eval()
    layers: Any = drafter.stages
    if recorded is not None:
        drafter.stages = layers = layers[: recorded + 1]
        layers[-1].mlp.experts = RoutingRecorder()
    for layer in layers if device != "cpu" else ():
        layer.mlp.experts.bfloat16()
    return _fill(drafter, tensors, stages, device, experts=recorded is None)


def _fill(
    module: Module, tensors: Weights, stages: int, device: str, *, experts: bool = True
) -> Module:
    module.to_empty(device=device)
    module.rotary_emb = modeling.DeepseekV4RotaryEmbedding(module.rotary_emb.config).to(device)
    # DeepSeek's tensors are views of the module's fused ones, so copying fills these.
    for name, view in head_from_module(module.state_dict(), stages).items():
        if experts or not EXPERT.match(name):
            view.copy_(tensors[name])
    return module


@torch.inference_mode()
def replay_routing(
    head: MTPHead, residual: Tensor, embeds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the routed experts are given, as a `RoutingRecorder` keeps it.

    `head` was built without experts; `residual` [T, S, D] and `embeds` [T, D] are those of the
    tokens themselves. Raises GraftError if the head gives values that are not finite.
    """
    next(unroll(head, residual[None], embeds[None], 1))
    return head.layer.mlp.experts.routed


@torch.inference_mode()
def replay_drafts(
    head: MTPHead, lm_head: Tensor, residual: Tensor, embeds: Tensor, start: int = 0, k: int = 1
) -> Tensor:
    """Return the k drafts int64 [B, R - start, k] of the step after each token from `start` on.

    Token i's are the guesses at tokens i + 2, i + 3 and so on, each as if those before it were
    right. `lm_head` [V, D] is the base's, in the head's dtype; `residual` [B, T, S, D] and `embeds`
    [B, T, D] are those of the tokens themselves. Raises GraftError as `replay_routing`.
    """
    streams = unroll(head, residual, embeds, k)
    logits = (head.logits(stream[:, start:], lm_head) for stream in streams)  # [B, R - start, V]
    return torch.stack([each.argmax(dim=-1) for each in logits], dim=-1)


def unroll(
    head: MTPHead, residual: Tensor, embeds: Tensor, k: int, *, recompute: bool = False
) -> Iterator[Tensor]:
    """Yield the head's stream [B, R, S, D] for each of k drafts, as a server makes them.

    `residual` is [B, T, S, D], `embeds` [B, T, D]. At token i the first draft reads token i + 1's
    embedding, each further one the stream of the draft before and the next token's.
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
        _expect_finite(stream, "mtp.0: gives", "a captured residual that is", "the head")
        yield stream


def _expect_finite(found: Tensor, who: str, given: str, what: str) -> None:
    if not torch.isfinite(found).all():
        cure = f"check that upstream and base are of the same model, or fetch {what} again"
        raise GraftError(f"{who} values that are not finite on {given}; {cure}")


# DSpark: a block of rows after each anchor


@torch.inference_mode()
def replay_blocks(
    drafter: DSpark, lm_head: Tensor, taps: Tensor, ids: Tensor, embed: Tensor, start: int, k: int
) -> Tensor:
    """Return the k drafts int64 [T - start, k] after each token from `start` on, in blocks of k.

    `taps` [T, L, D] are those of the tokens themselves, `embed` and `lm_head` [V, D] the base's.
    Raises GraftError as `replay_routing`.
    """
    given = _blocks(drafter, taps, ids, embed, torch.arange(start, len(taps)), k)
    ids = ids.to(lm_head.device)
    return torch.cat([drafter.draft(hidden, ids[at], lm_head) for at, hidden in given])


@torch.inference_mode()
def replay_block_routing(
    drafter: DSpark, taps: Tensor, token_ids: Tensor, embed: Tensor, start: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the last stage's experts are given, as a `RoutingRecorder` there keeps it.

    Every token from `start` on but the last is an anchor; all its rows count. Raises likewise.
    """
    recorder: Any = drafter.stages[-1]
    given = _blocks(drafter, taps, token_ids, embed, torch.arange(start, len(taps) - 1), rows)
    parts = [recorder.mlp.experts.routed for _ in given]
    x, experts, weights = (torch.cat(each) for each in zip(*parts, strict=True))
    return x, experts, weights


def _blocks(
    drafter: DSpark, taps: Tensor, token_ids: Tensor, embed: Tensor, anchors: Tensor, rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some anchors [A] at a time, and what their blocks say [A, rows, D]."""
    like = drafter.main_proj.weight
    context = drafter.context(taps.to(like), torch.arange(len(taps), device=like.device))
    for some in anchors.split(_ANCHORS):
        tokens = block_tokens(token_ids[some], drafter.noise, rows)
        at = some.to(like.device)
        hidden = drafter(embed[tokens.to(embed.device)].to(like), context, at, at)
        _expect_finite(hidden, "mtp: the DSpark drafter gives", "captured taps that are", "it")
        yield at, hidden
