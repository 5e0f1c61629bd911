"""Routed experts to INT4: the Hessians of their inputs, GPTQ, packing, the error that it left.

A matrix's Hessian is H = sum x x^T over its inputs x. w1 and w3 read the same inputs, the tokens
that the router sends to their expert, and share one. w2 reads what w1 and w3 make of them.

Shapes: N tokens of all sequences, T tokens that reach one expert, K experts a token, E experts of a
batch, D hidden size, M the experts' intermediate size, O outputs and I inputs of a matrix.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_graft.dsv4.names import Weights
from mtp_graft.dsv4.variants import int4_parts
from mtp_graft.errors import GraftError
from mtp_graft.quant import int4
from mtp_graft.quant.gptq import NotPositiveDefiniteError, Quantized, gptq, relative_error
from mtp_graft.recipe import QuantizeSection, Variant

MATRICES = ("w1", "w2", "w3")
#: Tokens in work at once; bounds memory where an expert has very many.
_TOKENS = 8192


class RoutedTokens:
    """The inputs of all routed experts; a token is stored once, however many experts it reaches."""

    def __init__(
        self, x: Tensor, experts: Tensor, num_experts: int, weights: Tensor | None = None
    ) -> None:
        """Sort tokens `x` [N, D] by their `experts` [N, K]; `weights` [N, K] count if given."""
        self.x = x
        by_expert = experts.flatten().long().argsort(stable=True)
        self.counts: list[int] = experts.flatten().bincount(minlength=num_experts).tolist()
        self._tokens = (by_expert // experts.shape[1]).split(self.counts)  # of each expert [T]
        weighed = torch.ones(1) if weights is None else weights.flatten()[by_expert]
        self._weights = weighed.expand(len(by_expert)).split(self.counts)

    def of_expert(self, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an expert's tokens [T, D] in order, or all if it has none, with weights [T]."""
        if not self.counts[expert]:
            yield from ((some, torch.ones(len(some))) for some in self.x.split(_TOKENS))
        tokens, weights = self._tokens[expert], self._weights[expert]
        for some, weighed in zip(tokens.split(_TOKENS), weights.split(_TOKENS), strict=True):
            yield self.x[some], weighed


def expert_hessians(
    tokens: Sequence[Iterable[tuple[Tensor, Tensor]]], weights: Weights, limit: float
) -> dict[str, Tensor]:
    """Return the Hessian f32 [E, I, I] of each matrix's inputs, by "w1", "w2", "w3".

    `tokens` are each expert's, in parts [T, D], each with the routing weights [T] that w2's error
    counts with; `weights` are the originals, w1 and w3 [E, M, D]; `limit` is `swiglu_limit`.
    """
    w1, w3 = weights["w1"], weights["w3"]
    num_experts, inner, hidden = w1.shape
    h13 = torch.zeros(num_experts, hidden, hidden, device=w1.device)  # of w1 and w3, [E, D, D]
    h2 = torch.zeros(num_experts, inner, inner, device=w1.device)  # of w2, [E, M, M]
    for e, parts in enumerate(tokens):
        for part, weighed in parts:
            x = part.to(w1.device)
            y = x.float()  # [T, D]
            is_exact = x.is_cuda and x.dtype == torch.bfloat16  # a product, in float32
            h13[e] += torch.mm(x.T, x, out_dtype=torch.float32) if is_exact else y.T @ y
            gate = F.silu((y @ w1[e].T).clamp(max=limit))
            a = gate * (y @ w3[e].T).clamp(-limit, limit)  # what w2 reads [T, M]
            a *= weighed.to(a)[:, None]
            h2[e].addmm_(a.T, a)
    return {"w1": h13, "w2": h2, "w3": h13}


def quantize_experts(
    weights: Weights,
    hessians: Weights,
    num_tokens: Sequence[int],
    experts: Sequence[str],
    settings: QuantizeSection,
) -> dict[str, Quantized]:
    """Return matrix -> the INT4 weights of `experts`, by the names of their modules, by GPTQ.

    `num_tokens` are behind each Hessian. Raises GraftError if it is not finite, or not positive
    definite when it is damped.
    """
    tokens = torch.tensor(num_tokens, dtype=torch.float32).clamp(min=1)  # [E]
    found: dict[str, Quantized] = {}
    # The outputs of a matrix are independent: w1 and w3, stacked, go through one sweep.
    for matrices in (("w1", "w3"), ("w2",)):
        stacked = torch.cat([weights[matrix] for matrix in matrices], dim=1)  # [E, O, I]
        hessian = hessians[matrices[0]]
        # The fewer the tokens, the less their Hessian says about the tokens to come.
        by_tokens = stacked.shape[-1] / tokens if settings.damping == "tokens" else 0 * tokens
        damp = by_tokens.clamp(min=settings.damp)  # [E]
        try:
            result = gptq(stacked, hessian, damp, settings.group_size, scale=settings.scale)
        except NotPositiveDefiniteError as error:
            problem = f"not positive definite with damp {settings.damp}; choose a larger damp"
            if not hessian[error.index].isfinite().all():
                problem = "not finite; capture again, and check the upstream shard"
            name = f"{experts[error.index]}.{matrices[0]}"
            raise GraftError(f"{name}: its Hessian is {problem}") from error
        codes, scales = (t.chunk(len(matrices), dim=1) for t in result)
        found |= zip(matrices, map(Quantized, codes, scales), strict=True)
    return found


def pack_experts(quantized: Mapping[str, Quantized], experts: Sequence[str]) -> dict[str, Tensor]:
    """Return INT4 experts as the checkpoint stores them, under its names of their modules."""
    stored: dict[str, Tensor] = {}
    for matrix, weights in quantized.items():
        for e, codes, scale in zip(experts, *weights, strict=True):
            stored |= {f"{e}.{matrix}.{part}": t for part, t in int4_parts(codes, scale).items()}
    return stored


def expert_errors(
    weights: Weights, hessians: Weights, quantized: Mapping[str, Quantized], group_size: int
) -> dict[Variant, dict[str, list[float]]]:
    """Return variant -> matrix -> each expert's `gptq.relative_error`, by undamped Hessians.

    `weights` are the original ones, which MXFP4 and BF16 hold exactly, `quantized` GPTQ's.
    """
    errors: dict[Variant, dict[str, list[float]]] = {"rtn": {}, "gptq": {}, "mxfp4": {}, "bf16": {}}
    for matrix, original in weights.items():
        scale = int4.group_scale(original, group_size)
        nearest = Quantized(int4.encode(original, scale), scale)
        for of_variant, rounded in (errors["rtn"], nearest), (errors["gptq"], quantized[matrix]):
            decoded = int4.decode(*rounded)
            of_variant[matrix] = relative_error(original, decoded, hessians[matrix]).tolist()
        errors["mxfp4"][matrix] = errors["bf16"][matrix] = [0.0] * len(original)
    return errors
