"""Calibrating a batch of routed experts: what they saw, GPTQ with it, and the error it left.

Shape legend: R rows of all sequences, E experts (of all, or of a batch), K experts a row, T rows
that reached one expert, D hidden size, M the experts' intermediate size; O outputs and I inputs of
a matrix (w1, w3: M, D; w2: D, M).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_graft.dsv4 import names
from mtp_graft.dsv4.variants import Variant, int4_parts
from mtp_graft.errors import GraftError
from mtp_graft.quant import int4
from mtp_graft.quant.gptq import (
    NotPositiveDefiniteError,
    Order,
    Quantized,
    Scale,
    gptq,
    output_energy,
)

MATRICES = ("w1", "w2", "w3")
#: Rows of activations worked on at once; bounds memory where an expert has very many.
_ROWS = 8192


class RoutedRows:
    """What reached each routed expert, over all sequences; every row is held once."""

    def __init__(self, x: Tensor, experts: Tensor, num_experts: int) -> None:
        """Sort the rows `x` [R, D] by the `experts` [R, K] that the router chose for them."""
        self.x = x
        by_expert = experts.flatten().long().argsort(stable=True)
        self._rows = by_expert // experts.shape[1]  # [R * K]
        self.counts: list[int] = experts.flatten().bincount(minlength=num_experts).tolist()
        self._ends = torch.tensor(self.counts).cumsum(0).tolist()

    def rows(self, expert: int) -> Tensor:
        """Return which rows of `x` reached an expert, int64 [T], in ascending order."""
        end = self._ends[expert]
        return self._rows[end - self.counts[expert] : end]

    def parts(self, expert: int) -> Iterator[Tensor]:
        """Yield the rows that reached an expert, a few thousand [T, D] at a time."""
        for part in self.rows(expert).split(_ROWS):
            yield self.x[part]

    def all_parts(self) -> Iterator[Tensor]:
        """Yield all rows, a few thousand [T, D] at a time."""
        yield from self.x.split(_ROWS)


def expert_hessians(
    rows: Sequence[Iterable[Tensor]], weights: Mapping[str, Tensor], limit: float
) -> dict[str, Tensor]:
    """Return H = sum x x^T, [E, I, I] f32, of each matrix's inputs; w1 and w3 share one.

    `rows` are each expert's, in parts [T, D]. An input of w2 is
    silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit) with the original weights, whatever the
    routing weight: the error that counts is that of the expert itself.
    Without any rows H is the identity, under which GPTQ is rounding to nearest.
    """
    num_experts, inner, hidden = weights["w1"].shape
    device = weights["w1"].device
    shared = torch.zeros(num_experts, hidden, hidden, device=device)
    down = torch.zeros(num_experts, inner, inner, device=device)
    for e, parts in enumerate(rows):
        seen = 0
        for part in parts:
            inputs = part.to(device).float()  # [T, D]
            gate = F.silu((inputs @ weights["w1"][e].T).clamp(max=limit))
            inner_inputs = gate * (inputs @ weights["w3"][e].T).clamp(-limit, limit)  # [T, M]
            shared[e] += _gram(part.to(device))
            down[e].addmm_(inner_inputs.T, inner_inputs)
            seen += len(part)
        if not seen:
            shared[e].fill_diagonal_(1.0)
            down[e].fill_diagonal_(1.0)
    return {"w1": shared, "w2": down, "w3": shared}


def _gram(rows: Tensor) -> Tensor:
    """Return x^T x f32 [D, D] of rows x [T, D]; BF16 rows are multiplied as such on a GPU.

    Products of BF16 numbers are exact in float32, so only the order of summation differs.
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return torch.mm(rows.T, rows, out_dtype=torch.float32)
    return rows.float().T @ rows.float()


@dataclass(frozen=True)
class GptqRules:
    """How GPTQ rounds, apart from the Hessian; `quant.gptq.gptq` explains order and scale."""

    damp: float = 0.01
    #: "tokens" damps an expert by inputs / tokens of the mean diagonal where that is more than
    #: `damp`: the fewer tokens, the less its Hessian says about the tokens to come.
    damping: Literal["fixed", "tokens"] = "tokens"
    group_size: int = 128
    order: Order = "stored"
    scale: Scale = "mse"

    def damp_for(self, counts: Sequence[int], num_inputs: int) -> Tensor:
        """Return each matrix's damp f32 [E], for the number of tokens behind its Hessian."""
        tokens = torch.tensor(counts, dtype=torch.float32).clamp(min=1)
        least = torch.full_like(tokens, self.damp)
        return least if self.damping == "fixed" else torch.maximum(least, num_inputs / tokens)


def quantize_experts(
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    counts: Sequence[int],
    experts: range,
    rules: GptqRules,
) -> dict[str, Quantized]:
    """Return matrix -> the experts' INT4 weights by GPTQ.

    `counts` are the tokens behind each expert's Hessian. Raises GraftError for a Hessian that is
    not finite, and for one that damping does not make positive definite.
    """
    found: dict[str, Quantized] = {}
    # The rows of a matrix are independent: w1 and w3 go through one sweep, one below the other.
    for swept in (("w1", "w3"), ("w2",)):
        stacked = torch.cat([weights[matrix] for matrix in swept], dim=1)
        _check_finite(hessians[swept[0]], experts, swept[0])
        try:
            result = gptq(
                stacked,
                hessians[swept[0]],
                rules.damp_for(counts, stacked.shape[-1]),
                rules.group_size,
                order=rules.order,
                scale=rules.scale,
            )
        except NotPositiveDefiniteError as error:
            raise GraftError(
                f"{names.HEAD_PREFIX}ffn.experts.{experts[error.index]}.{swept[0]}: its Hessian "
                f"is not positive definite with damp {rules.damp}; choose a larger damp"
            ) from error
        codes = result.codes.chunk(len(swept), dim=1)
        scales = result.scale.chunk(len(swept), dim=1)
        found.update(zip(swept, map(Quantized, codes, scales), strict=True))
    return found


def _check_finite(hessian: Tensor, experts: range, matrix: str) -> None:
    """Raise GraftError for a Hessian [E, I, I] of inputs that are not finite, or too large."""
    # A sum of squares: an input that is not finite shows on the diagonal.
    finite = hessian.diagonal(dim1=1, dim2=2).isfinite().all(dim=1)  # [E]
    if not finite.all():
        expert = experts[int(finite.logical_not().nonzero()[0])]
        raise GraftError(
            f"{names.HEAD_PREFIX}ffn.experts.{expert}.{matrix}: the squares of its inputs add up "
            "to no finite number, so no damp helps; the capture, or the head's weights, hold "
            "values beyond what this model computes: capture again, and check the upstream shard"
        )


def pack_experts(quantized: Mapping[str, Quantized], experts: range) -> dict[str, Tensor]:
    """Return INT4 experts as the checkpoint stores them, under its names."""
    stored: dict[str, Tensor] = {}
    for matrix, weights in quantized.items():
        words = int4.pack(weights.codes)  # [E, O, I/8]
        for e, packed, scale in zip(experts, words, weights.scale, strict=True):
            shape = [packed.shape[0], int4.CODES_PER_WORD * packed.shape[1]]
            stem = f"{names.HEAD_PREFIX}ffn.experts.{e}.{matrix}"
            stored.update(int4_parts(stem, packed, scale, shape))
    return stored


def expert_errors(
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    quantized: Mapping[str, Quantized],
    group_size: int,
) -> dict[Variant, dict[str, list[float]]]:
    """Return variant -> matrix -> the relative error of each expert's matrix.

    `weights` are the original ones, `quantized` GPTQ's. The error is `gptq.relative_error`'s, under
    the undamped Hessians; a matrix whose inputs are all zero loses nothing. Kept MXFP4 is the
    original bit for bit, so its error is 0.
    """
    errors: dict[Variant, dict[str, list[float]]] = {
        variant: {} for variant in ("rtn", "gptq", "mxfp4", "bf16")
    }
    for matrix, original in weights.items():
        whole = output_energy(original, hessians[matrix])  # [E]
        scale = int4.group_scale(original, group_size)
        values: dict[Variant, Tensor] = {
            "rtn": int4.decode(int4.encode(original, scale), scale),
            "gptq": int4.decode(quantized[matrix].codes, quantized[matrix].scale),
            "bf16": original.to(torch.bfloat16).float(),
        }
        errors["mxfp4"][matrix] = [0.0] * len(original)
        for variant, decoded in values.items():
            off = original - decoded
            # A variant that keeps the values costs no product.
            lost = output_energy(off, hessians[matrix]) if off.any() else torch.zeros_like(whole)
            share = torch.where(whole > 0, lost / whole, 0.0)
            errors[variant][matrix] = share.clamp(min=0).sqrt().tolist()
    return errors
