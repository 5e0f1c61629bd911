"""Heal: train the head's dense part towards the base that it drafts for, k drafts a step.

A draft's target is the base's distribution there, which follows from the captured residual.

Shapes: B sequences, T tokens of the longest, N drafts that count, S streams, D hidden size, V
vocabulary.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.names import Weights, head_from_module
from mtp_graft.dsv4.replay import unroll
from mtp_graft.quant import decode_fp8, encode_fp8
from mtp_graft.recipe import Loss

#: Drafts whose logits are in memory at once.
_DRAFTS = 2048
#: The routed experts stay as they are stored; so does the router, unless it is to be trained.
EXPERTS, ROUTER = ".mlp.experts.", ".mlp.gate."
#: What leads from the base's residual to its logits, by the base's names.
OUTPUT = ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm.weight", "head.weight")
#: How far a draft's distribution is from the base's, of log-probabilities [N, V] of either: [N].
#: One less total variation is the acceptance of drawn drafts.
LOSSES: Mapping[Loss, Callable[[Tensor, Tensor], Tensor]] = {
    "tv": lambda draft, base: 0.5 * (draft.exp() - base.exp()).abs().sum(-1),
    "kl": lambda draft, base: (base.exp() * (base - draft)).sum(-1),
    "ce": lambda draft, base: F.nll_loss(draft, base.argmax(-1), reduction="none"),
}


class Batch(NamedTuple):
    """Some captured sequences, padded at their ends."""

    residual: Tensor  # [B, T, S, D], the base's
    embeds: Tensor  # [B, T, D]
    lengths: Tensor  # int64 [B]
    token_ids: Sequence[Tensor] = ()  # int64 [T] of each, on the CPU


class BaseOutput(nn.Module):
    """The base's way from its residual to logits: hyper-connection head, norm and LM head."""

    def __init__(self, config: DeepseekV4Config, tensors: Weights) -> None:
        """Take the tensors named in OUTPUT."""
        super().__init__()
        self.hc_head = modeling.DeepseekV4HyperHead(config)
        names = {name: name.replace("hc_", "hc_head_") for name in self.hc_head.state_dict()}
        self.hc_head.load_state_dict({own: tensors[n].float() for own, n in names.items()})
        self.requires_grad_(False).to(tensors["head.weight"].device)
        self.norm, self.lm_head = tensors["norm.weight"].float(), tensors["head.weight"]
        self.eps: float = config.rms_norm_eps

    def forward(self, residual: Tensor) -> Tensor:
        """Return log-probabilities [N, V] of residuals [N, S, D]."""
        x = self.hc_head(residual[None].float())[0]
        x = F.rms_norm(x, self.norm.shape, self.norm, self.eps)
        return F.linear(x.to(self.lm_head), self.lm_head).float().log_softmax(-1)


class _Fp8(nn.Module):
    """Round a weight to FP8 blocks as it will be stored; the gradient passes as if it were not."""

    def forward(self, weight: Tensor) -> Tensor:
        codes, scale = encode_fp8(weight.detach())
        return weight + (decode_fp8(codes, scale) - weight.detach())


def trained_parts(
    head: MTPHead, fp8: Container[str], frozen: Sequence[str] = (EXPERTS, ROUTER)
) -> dict[str, nn.Parameter]:
    """Let the head be trained but for its `frozen` parts; return the others by module names.

    The weights with a checkpoint name in `fp8` are rounded in every pass, as when they are stored.
    """
    head.requires_grad_(False)
    parts: dict[str, nn.Parameter] = {}
    for path, parameter in list(head.named_parameters()):
        if any(part in path for part in frozen):
            continue
        parameter.requires_grad_()
        parts[path] = parameter
        if any(name in fp8 for name in head_from_module({path: parameter})):
            module = head.get_submodule(path.removesuffix(".weight"))
            parametrize.register_parametrization(module, "weight", _Fp8())
    return parts


def distance(
    head: MTPHead,
    base: BaseOutput,
    batch: Batch,
    losses: Mapping[Loss, float],
    weights: list[float],
    *,
    recompute: bool = False,
) -> Tensor:
    """Return the mean distance of the drafts from what the base says, over the steps of a batch.

    `losses` are weights of LOSSES, `weights` those of a step's drafts. With `recompute` the
    backward pass computes the head's activations again, a draft at a time.
    """
    total = torch.zeros((), device=batch.residual.device)
    drafts = _drafts(head, batch, len(weights), recompute)
    for (stream, target), weight in zip(drafts, weights, strict=True):
        parts = zip(stream.split(_DRAFTS), target.split(_DRAFTS), strict=True)
        of_draft = [checkpoint(_loss, head, base, losses, *p, use_reentrant=False) for p in parts]
        total = total + weight * torch.stack(of_draft).sum() / len(stream)
    return total / sum(weights)


def _drafts(
    head: MTPHead, batch: Batch, k: int, recompute: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield stream and target [N, S, D] of each of k drafts, of those that the text has."""
    at = torch.arange(batch.residual.shape[1], device=batch.lengths.device)
    unrolled = unroll(head, batch.residual, batch.embeds, k, recompute=recompute)
    for draft, stream in enumerate(unrolled):
        target = batch.residual[:, 1 + draft :]  # token i + 1 + draft says what comes next
        known = at[1 + draft :] < batch.lengths[:, None]
        yield stream[:, : target.shape[1]][known], target[known]


def _loss(
    head: MTPHead, base: BaseOutput, losses: Mapping[Loss, float], stream: Tensor, target: Tensor
) -> Tensor:
    logits = head.logits(stream[None], base.lm_head.to(stream.dtype))[0]
    draft = logits.float().log_softmax(-1)
    with torch.no_grad():
        said = base(target)
    return sum((w * LOSSES[n](draft, said).sum() for n, w in losses.items()), draft.new_zeros(()))
