"""Calibrating a batch of routed experts: what they saw, GPTQ with it, and the error it left.

Shape legend: E experts of a batch, T tokens that reached one, D hidden size, M the experts'
intermediate size; O outputs and I inputs of a matrix (w1, w3: M, D; w2: D, M).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_graft.dsv4 import names
from mtp_graft.dsv4.variants import pack_int4
from mtp_graft.errors import GraftError
from mtp_graft.quant.gptq import NotPositiveDefiniteError, gptq, relative_error

MATRICES = ("w1", "w2", "w3")
#: Rows of activations worked on at once; bounds memory where an expert has very many.
_ROWS = 8192


def expert_hessians(
    rows: Sequence[Tensor], weights: Mapping[str, Tensor], limit: float
) -> dict[str, Tensor]:
    """Return H = sum x x^T, [E, I, I] f32, of each matrix's inputs; w1 and w3 share one.

    An input of w2 is silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit) with the original
    weights, whatever the routing weight: the error that counts is that of the expert itself.
    Without any rows H is the identity, under which GPTQ is rounding to nearest.
    """
    device = weights["w1"].device
    shared, down = [], []
    for e, x in enumerate(rows):
        h1 = torch.zeros(weights["w1"].shape[2], weights["w1"].shape[2], device=device)
        h2 = torch.zeros(weights["w2"].shape[2], weights["w2"].shape[2], device=device)
        if not len(x):
            h1, h2 = h1.fill_diagonal_(1.0), h2.fill_diagonal_(1.0)
        for part in x.split(_ROWS):
            inputs = part.to(device, torch.float32)  # [T, D]
            gate = F.silu((inputs @ weights["w1"][e].T).clamp(max=limit))
            inner = gate * (inputs @ weights["w3"][e].T).clamp(-limit, limit)  # [T, M]
            h1.addmm_(inputs.T, inputs)
            h2.addmm_(inner.T, inner)
        shared.append(h1)
        down.append(h2)
    h13 = torch.stack(shared)
    return {"w1": h13, "w2": torch.stack(down), "w3": h13}


def quantize_experts(
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    experts: range,
    damp: float,
    group_size: int,
) -> dict[str, Tensor]:
    """Return the experts by GPTQ in INT4, on the CPU under the names of the checkpoint.

    Raises GraftError for a Hessian that damping does not make positive definite.
    """
    stored: dict[str, Tensor] = {}
    # The rows of a matrix are independent: w1 and w3 go through one sweep, one below the other.
    for swept in (("w1", "w3"), ("w2",)):
        stacked = torch.cat([weights[matrix] for matrix in swept], dim=1)
        try:
            result = gptq(stacked, hessians[swept[0]], damp, group_size)
        except NotPositiveDefiniteError as error:
            raise GraftError(
                f"{names.HEAD_PREFIX}ffn.experts.{experts[error.index]}.{swept[0]}: its Hessian "
                f"is not positive definite with damp {damp}; choose a larger damp"
            ) from error
        codes = result.codes.chunk(len(swept), dim=1)
        scales = result.scale.chunk(len(swept), dim=1)
        for matrix, matrix_codes, matrix_scale in zip(swept, codes, scales, strict=True):
            for e, expert_codes, scale in zip(experts, matrix_codes, matrix_scale, strict=True):
                stem = f"{names.HEAD_PREFIX}ffn.experts.{e}.{matrix}"
                stored.update(pack_int4(stem, expert_codes.cpu(), scale.cpu()))
    return stored


def expert_errors(
    decoded: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    experts: range,
) -> dict[str, list[float]]:
    """Return the relative error of each expert's matrices, by matrix.

    `decoded` are a variant's matrices by name, in any order; `weights` are the original ones.
    """
    errors = {}
    for matrix, original in weights.items():
        found = [decoded[f"{names.HEAD_PREFIX}ffn.experts.{e}.{matrix}.weight"] for e in experts]
        stacked = torch.stack(found).to(original.device)
        errors[matrix] = relative_error(original, stacked, hessians[matrix]).tolist()
    return errors
