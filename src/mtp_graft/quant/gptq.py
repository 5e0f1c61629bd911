"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounding that makes up for its own errors.

Rounding one input's weights moves the layer's output; the Hessian of the squared output error,
H = X^T X, says how the weights of the inputs still to come best take that back. Inputs are
rounded in their stored order, a group of them at a time.

Shape legend: B matrices (experts, independent of each other), O outputs, I inputs, G groups of
inputs, N inputs of one group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_graft.quant import int4


class NotPositiveDefiniteError(Exception):
    """A damped Hessian has no Cholesky factor; `index` is its place in the batch."""

    def __init__(self, index: int) -> None:
        super().__init__(f"Hessian {index} is not positive definite after damping")
        self.index = index


@dataclass(frozen=True)
class Quantized:
    """INT4 weights: `quant.int4.decode(codes, scale)` are the values."""

    codes: Tensor  # int8 [B, O, I], -8 to 7
    scale: Tensor  # bfloat16 [B, O, G]


def gptq(weight: Tensor, hessian: Tensor, damp: float = 0.01, group_size: int = 128) -> Quantized:
    """Quantize `weight` [B, O, I] to symmetric INT4 so that its outputs move least.

    `hessian` [B, I, I] is sum x x^T over the inputs x seen, in any scale: the sweep does not
    depend on it. `damp` times the mean of its diagonal is added to the diagonal. Inputs never
    seen (zero diagonal) are rounded to nearest and neither give nor take corrections.
    The rule for scales is `int4.group_scale`'s, applied to each group as the sweep reaches it,
    with the corrections of all groups before it. Computed in float32.
    Raises NotPositiveDefiniteError.
    """
    assert weight.shape[-1] % group_size == 0, "callers check that groups are whole"
    factor = inverse_factor(damped(hessian.float(), damp))  # U [B, I, I], upper
    columns = weight.float().mT.contiguous()  # [B, I, O]: the sweep works on whole inputs
    codes = torch.empty_like(columns, dtype=torch.int8)  # [B, I, O]
    scales = []
    for start in range(0, columns.shape[1], group_size):
        group = slice(start, start + group_size)
        scale = int4.group_scale(columns[:, group].mT, group_size)  # [B, O, 1]
        codes[:, group], errors = sweep(columns[:, group], factor[:, group, group], scale.mT)
        rest = slice(start + group_size, None)
        columns[:, rest] -= factor[:, group, rest].mT @ errors
        scales.append(scale)
    return Quantized(codes.mT.contiguous(), torch.cat(scales, dim=-1))


def sweep(columns: Tensor, factor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round the inputs of one group in order; return codes int8 and errors f32, both [B, N, O].

    `columns` [B, N, O] are the group's weights, corrected for all groups before; `factor`
    [B, N, N] is U's diagonal block; `scale` is [B, 1, O]. An error is the rounding error over
    U's diagonal entry: times U's row it is the correction of the inputs to come. The group is
    halved down to single inputs, so that all but the smallest corrections are matrix products.
    """
    num_inputs = columns.shape[1]
    if num_inputs == 1:
        codes = (columns / scale.float()).round_().clamp_(int4.CODE_MIN, int4.CODE_MAX)
        return codes.to(torch.int8), (columns - codes * scale.float()) / factor
    first, second = slice(0, num_inputs // 2), slice(num_inputs // 2, None)
    codes_1, errors_1 = sweep(columns[:, first], factor[:, first, first], scale)
    corrected = torch.baddbmm(columns[:, second], factor[:, first, second].mT, errors_1, alpha=-1)
    codes_2, errors_2 = sweep(corrected, factor[:, second, second], scale)
    return torch.cat((codes_1, codes_2), dim=1), torch.cat((errors_1, errors_2), dim=1)


def damped(hessian: Tensor, damp: float) -> Tensor:
    """Return `hessian` [B, I, I] with `damp` times its mean diagonal added to the diagonal.

    An input never seen has a zero row and column; it gets 1 on the diagonal, which leaves it
    independent of the others.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)  # [B, I]
    added = damp * diagonal.mean(dim=-1, keepdim=True)
    added = torch.where(diagonal == 0, torch.ones_like(diagonal), added)
    return hessian + torch.diag_embed(added)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return U [B, I, I], upper with positive diagonal and U^T U = H^-1.

    With J the reversal of indices and J H J = L L^T, U is J L^-1 J: one Cholesky and one
    triangular inverse instead of the usual Cholesky, inverse, Cholesky.
    Raises NotPositiveDefiniteError.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(-2, -1))
    if failed.any():
        raise NotPositiveDefiniteError(int(failed.nonzero()[0]))
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(-2, -1)


def output_energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return ||W H^1/2||_F^2 [B], the squared outputs of `weight` [B, O, I] over the inputs seen.

    Products in float32, their sum in float64.
    """
    weight = weight.float()
    return ((weight @ hessian.float()) * weight).sum(dim=(-2, -1), dtype=torch.float64)


def relative_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> Tensor:
    """Return ||(W - Q) H^1/2||_F / ||W H^1/2||_F, float64 [B], of [B, O, I] matrices.

    `hessian` [B, I, I] is undamped. The ratio is that of the outputs' root mean squares.
    """
    error = output_energy(weight.float() - decoded.float(), hessian)
    return (error / output_energy(weight, hessian)).clamp(min=0).sqrt()
