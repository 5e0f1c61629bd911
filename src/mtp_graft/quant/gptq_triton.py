"""The inner loops of GPTQ as Triton kernels: the sweep over a group, the search for its scales.

A program takes one matrix and a few of its outputs, whose weights stay in registers meanwhile.

Shape legend: B matrices, N inputs of one group, O outputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_graft.quant import int4

#: Outputs of one program, and its warps: the fastest of eight tried for [16, 128, 4096], H100.
OUTPUTS, WARPS = 64, 2
_CODE_MIN, _CODE_MAX = tl.constexpr(int4.CODE_MIN), tl.constexpr(int4.CODE_MAX)
_TRIED = tl.constexpr(int4.SCALES_TRIED)


def sweep(columns: Tensor, factor: Tensor, step: Tensor) -> Tensor:
    """Do what `gptq.sweep` does; `columns` and `step` are [B, N, O], `factor` [B, N, N]."""
    codes = torch.empty(columns.shape, dtype=torch.int8, device=columns.device)
    _launch(_sweep, (columns, factor, step), codes)
    return codes


def searched_scale(columns: Tensor, importance: Tensor) -> Tensor:
    """Do what `int4.searched_scale` does for one group `columns` [B, N, O]; `importance` [B, N]."""
    num_matrices, _, num_outputs = columns.shape
    scale = torch.empty(num_matrices, num_outputs, 1, dtype=torch.bfloat16, device=columns.device)
    _launch(_search, (columns, importance), scale)
    return scale


def _launch(kernel: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
    """Run a kernel that writes `out` for the columns [B, N, O], the first of `inputs`."""
    num_matrices, num_inputs, num_outputs = inputs[0].shape
    with torch.cuda.device(out.device):  # Triton launches on the current one
        kernel[(triton.cdiv(num_outputs, OUTPUTS), num_matrices)](
            *(*inputs, out),
            *(stride for tensor in inputs for stride in tensor.stride()),
            num_inputs,
            num_outputs,
            INPUTS=triton.next_power_of_2(num_inputs),
            OUTPUTS=OUTPUTS,
            num_warps=WARPS,
        )


@triton.jit
def _rounded(value):
    code = tl.minimum(tl.maximum(value, _CODE_MIN), _CODE_MAX)
    return (code + 12582912.0) - 12582912.0  # 1.5 * 2**23: to nearest, ties to even


# fmt: off
@triton.jit
def _sweep(
    columns_ptr, factor_ptr, step_ptr, codes_ptr,
    columns_b, columns_n, columns_o,
    factor_b, factor_i, factor_j,
    step_b, step_n, step_o,
    num_inputs, num_outputs,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):
    # fmt: on
    matrix = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    whole, inside = outputs < num_outputs, inputs < num_inputs
    columns_ptr += matrix * columns_b + inputs[:, None] * columns_n + outputs * columns_o
    columns = tl.load(columns_ptr, mask=inside[:, None] & whole, other=0.0)  # [INPUTS, OUTPUTS]
    factor_ptr += matrix * factor_b
    step_ptr += matrix * step_b + outputs * step_o
    codes_ptr += matrix * num_inputs * num_outputs + outputs
    for i in range(num_inputs):
        step = tl.load(step_ptr + i * step_n, mask=whole, other=1.0)
        later = inside & (inputs > i)
        row = tl.load(factor_ptr + i * factor_i + inputs * factor_j, mask=later, other=0.0)
        diagonal = tl.load(factor_ptr + i * (factor_i + factor_j))
        column = tl.sum(tl.where(inputs[:, None] == i, columns, 0.0), axis=0)
        code = _rounded(tl.div_rn(column, step))
        error = tl.div_rn(column - code * step, diagonal)
        columns -= row[:, None] * error
        tl.store(codes_ptr + i * num_outputs, code.to(tl.int8), mask=whole)


# fmt: off
@triton.jit
def _search(
    columns_ptr, importance_ptr, scale_ptr,
    columns_b, columns_n, columns_o,
    importance_b, importance_n,
    num_inputs, num_outputs,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):
    # fmt: on
    matrix = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    whole, inside = outputs < num_outputs, inputs < num_inputs
    columns_ptr += matrix * columns_b + inputs[:, None] * columns_n + outputs * columns_o
    columns = tl.load(columns_ptr, mask=inside[:, None] & whole, other=0.0)  # [INPUTS, OUTPUTS]
    importance_ptr += matrix * importance_b + inputs * importance_n
    importance = tl.load(importance_ptr, mask=inside, other=0.0)
    largest = tl.max(tl.abs(columns), axis=0)
    largest = tl.div_rn(largest, tl.full([OUTPUTS], 7.5, tl.float32)).to(tl.bfloat16).to(tl.float32)
    largest = tl.where(largest > 0, largest, 1.0)
    best = largest
    least = tl.full([OUTPUTS], float("inf"), tl.float32)
    fifty = tl.full([OUTPUTS], 50.0, tl.float32)
    for tried in range(_TRIED):
        scale = (largest * tl.div_rn(fifty - tried, fifty)).to(tl.bfloat16).to(tl.float32)
        off = _rounded(tl.div_rn(columns, scale[None, :])) * scale - columns
        error = tl.sum(off * off * importance[:, None], axis=0)
        best = tl.where(error < least, scale, best)
        least = tl.minimum(error, least)
    tl.store(scale_ptr + matrix * num_outputs + outputs, best.to(tl.bfloat16), mask=whole)
