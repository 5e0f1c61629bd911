"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounding that makes up for its own errors.

Rounding one input's weights moves the layer's output; the Hessian of the squared output error,
H = X^T X, says how the weights of the inputs still to come best take that back. Inputs are
rounded one after the other, a group of them (those that share a scale) at a time.

The paper carries errors forward with U, the upper Cholesky factor of H^-1: E, the rounding errors
over U's diagonal, give W - Q = E U. With R = U^-1, upper triangular and H = R R^T, that reads
(W - Q) R = E. So of the inputs before a group only W - Q is needed, and of U only the diagonal
blocks, the inverses of R's: one Cholesky factorization of the reversed H, and no inverse of it.

Shape legend: B matrices (experts, independent of each other), O outputs, I inputs, G groups of
inputs, N inputs of one group.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mtp_graft.quant import int4

Scale = Literal["absmax", "mse"]


class NotPositiveDefiniteError(Exception):
    """A damped Hessian has no finite Cholesky factor; `index` is its place in the batch."""

    def __init__(self, index: int) -> None:
        super().__init__(f"Hessian {index} is not positive definite after damping")
        self.index = index


class Quantized(NamedTuple):
    """INT4 weights: `quant.int4.decode(codes, scale)` are the values."""

    codes: Tensor  # int8 [B, O, I], -8 to 7
    scale: Tensor  # bfloat16 [B, O, G]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    damp: float | Tensor = 0.01,
    group_size: int = 128,
    *,
    scale: Scale = "absmax",
) -> Quantized:
    """Quantize `weight` [B, O, I] to symmetric INT4 so that its outputs move least.

    `hessian` [B, I, I] is sum x x^T over the inputs x seen, in any scale. `damp`, one number or
    one for each matrix [B], times the mean of its diagonal is added to the diagonal. Inputs never
    seen (zero diagonal) are rounded to nearest and neither give nor take corrections.

    A group's scale is chosen when the sweep reaches it, with the corrections of all groups before:
    by `int4.group_scale` ("absmax") or `int4.searched_scale` ("mse"). Computed in float32 on the
    device of `weight`. Raises NotPositiveDefiniteError.
    """
    assert weight.shape[-1] % group_size == 0, "callers check that groups are whole"
    hessian = hessian.float()
    importance = hessian.diagonal(dim1=-2, dim2=-1)  # [B, I]
    root = _upper_root(_damped(hessian, damp))  # R [B, I, I]
    # [B, I, O], a copy: the sweep works on whole inputs, and leaves W - Q here.
    columns = weight.mT.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    codes = torch.empty_like(columns, dtype=torch.int8)  # [B, I, O]
    identity = torch.eye(group_size, dtype=root.dtype, device=root.device)
    scales = []
    for start in range(0, columns.shape[1], group_size):
        group = slice(start, start + group_size)
        # U's diagonal block [B, N, N]
        factor = torch.linalg.solve_triangular(root[:, group, group], identity, upper=True)
        pulled = root[:, :start, group].mT @ columns[:, :start]  # (W - Q) R
        corrected = torch.baddbmm(columns[:, group], factor.mT, pulled)  # [B, N, O]
        scales.append(_scale_of_group(corrected, importance[:, group], scale))  # [B, O, 1]
        step = scales[-1].mT.float().expand(-1, group_size, -1)
        codes[:, group] = sweep(corrected, factor, step)
        columns[:, group].addcmul_(codes[:, group], step, value=-1)
    return Quantized(codes.mT.contiguous(), torch.cat(scales, dim=-1))


def _scale_of_group(columns: Tensor, importance: Tensor, rule: Scale) -> Tensor:
    """Return the scales [B, O, 1] of one group's weights [B, N, O], under the rule asked for."""
    if rule == "absmax":
        return int4.group_scale(columns.mT, columns.shape[1])
    if columns.is_cuda:
        from mtp_graft.quant import gptq_triton

        return gptq_triton.searched_scale(columns, importance)
    return int4.searched_scale(columns.mT, columns.shape[1], importance)


def sweep(columns: Tensor, factor: Tensor, step: Tensor) -> Tensor:
    """Round the inputs of one group in order; return the codes, int8 [B, N, O].

    `columns` [B, N, O] are the group's weights, corrected for all inputs before; `factor`
    [B, N, N] is U's diagonal block; `step` [B, N, O] is the scale of each weight. Float32 all.
    """
    if columns.is_cuda:
        from mtp_graft.quant import gptq_triton

        return gptq_triton.sweep(columns, factor, step)
    return _sweep_halves(columns, factor, step)[0]


def _sweep_halves(columns: Tensor, factor: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Do `sweep`, halving the group down to single inputs: corrections become matrix products.

    Returns the codes and the errors f32 [B, N, O]: an error times U's row is the correction of
    the inputs to come.
    """
    num_inputs = columns.shape[1]
    if num_inputs == 1:
        codes = (columns / step).round_().clamp_(int4.CODE_MIN, int4.CODE_MAX)
        return codes.to(torch.int8), (columns - codes * step) / factor
    first, second = slice(0, num_inputs // 2), slice(num_inputs // 2, None)
    codes_1, errors_1 = _sweep_halves(columns[:, first], factor[:, first, first], step[:, first])
    corrected = torch.baddbmm(columns[:, second], factor[:, first, second].mT, errors_1, alpha=-1)
    codes_2, errors_2 = _sweep_halves(corrected, factor[:, second, second], step[:, second])
    return torch.cat((codes_1, codes_2), dim=1), torch.cat((errors_1, errors_2), dim=1)


def _damped(hessian: Tensor, damp: float | Tensor) -> Tensor:
    """Return `hessian` [B, I, I] with `damp` times its mean diagonal added to the diagonal.

    `damp` is one number or one for each matrix [B]. An input never seen has a zero row and column;
    it gets 1 on the diagonal, which leaves it independent of the others.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)  # [B, I]
    share = torch.as_tensor(damp, dtype=hessian.dtype, device=hessian.device).reshape(-1, 1)
    added = torch.where(diagonal == 0, 1.0, share * diagonal.mean(dim=-1, keepdim=True))
    result = hessian.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(added)
    return result


def _upper_root(hessian: Tensor) -> Tensor:
    """Return R [B, I, I], upper triangular with positive diagonal and R R^T = H.

    With J the reversal of indices and J H J = L L^T, R is J L J. Raises NotPositiveDefiniteError.
    """
    lower, info = torch.linalg.cholesky_ex(hessian.flip(-2, -1))
    # A sum of squares: an input that is not finite shows on the diagonal.
    factored = (info == 0) & hessian.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=-1)  # [B]
    if not factored.all():
        raise NotPositiveDefiniteError(int(factored.int().argmin()))
    return lower.flip(-2, -1)


def relative_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> Tensor:
    """Return ||(W - Q) H^1/2||_F / ||W H^1/2||_F, float64 [B], of [B, O, I] matrices.

    It is that of the outputs' root mean squares, and 0 for zeros; `hessian` [B, I, I] is undamped.
    """
    parts = (weight.float() - decoded, weight.float())
    lost, whole = (((p @ hessian.float()) * p).sum((-2, -1), dtype=torch.float64) for p in parts)
    return torch.where(whole > 0, lost / whole, 0.0).clamp(min=0).sqrt()
