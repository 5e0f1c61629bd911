"""The inner loops of GPTQ as Triton kernels: the sweep over a block, the search for its scales.

A program takes one matrix and a few of its outputs, whose weights stay in registers meanwhile.

Shape legend: B matrices, N inputs of one block, O outputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_graft.quant import int4

#: Outputs of one program, and its warps: the fastest of eight tried for [16, 128, 4096], H100.
OUTPUTS, WARPS = 64, 2


def sweep(columns: Tensor, factor: Tensor, step: Tensor) -> Tensor:
    """Do what `gptq.sweep` does; `columns` and `step` are [B, N, O], `factor` [B, N, N]."""
    num_matrices, num_inputs, num_outputs = columns.shape
    codes = torch.empty(columns.shape, dtype=torch.int8, device=columns.device)
    grid = (triton.cdiv(num_outputs, OUTPUTS), num_matrices)
    tensors = (columns, factor, step)
    with torch.cuda.device(columns.device):  # Triton launches on the current one
        _sweep[grid](
            *tensors,
            codes,
            *(stride for tensor in tensors for stride in tensor.stride()),
            num_inputs,
            num_outputs,
            INPUTS=triton.next_power_of_2(num_inputs),
            OUTPUTS=OUTPUTS,
            CODE_MIN=int4.CODE_MIN,
            CODE_MAX=int4.CODE_MAX,
            num_warps=WARPS,
        )
    return codes


# fmt: off
@triton.jit
def _sweep(
    columns_ptr, factor_ptr, step_ptr, codes_ptr,
    columns_b, columns_n, columns_o,
    factor_b, factor_i, factor_j,
    step_b, step_n, step_o,
    num_inputs, num_outputs,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr,
):
    # fmt: on
    matrix = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    whole, inside = outputs < num_outputs, inputs < num_inputs
    columns = tl.load(
        columns_ptr + matrix * columns_b + inputs[:, None] * columns_n + outputs * columns_o,
        mask=inside[:, None] & whole,
        other=0.0,
    )  # [INPUTS, OUTPUTS]
    factor_ptr += matrix * factor_b
    step_ptr += matrix * step_b + outputs * step_o
    codes_ptr += matrix * num_inputs * num_outputs + outputs
    for i in range(num_inputs):
        step = tl.load(step_ptr + i * step_n, mask=whole, other=1.0)
        later = inside & (inputs > i)
        row = tl.load(factor_ptr + i * factor_i + inputs * factor_j, mask=later, other=0.0)
        diagonal = tl.load(factor_ptr + i * (factor_i + factor_j))
        column = tl.sum(tl.where(inputs[:, None] == i, columns, 0.0), axis=0)
        code = tl.minimum(tl.maximum(tl.div_rn(column, step), CODE_MIN), CODE_MAX)
        code = (code + 12582912.0) - 12582912.0  # 1.5 * 2**23: to nearest, ties to even
        error = tl.div_rn(column - code * step, diagonal)
        columns -= row[:, None] * error
        tl.store(codes_ptr + i * num_outputs, code.to(tl.int8), mask=whole)


def searched_scale(columns: Tensor, importance: Tensor) -> Tensor:
    """Do what `int4.searched_scale` does for the one group `columns` [B, N, O]: BF16 [B, O, 1].

    `importance` [B, N] weighs the inputs' errors.
    """
    num_matrices, num_inputs, num_outputs = columns.shape
    scale = torch.empty(num_matrices, num_outputs, 1, dtype=torch.bfloat16, device=columns.device)
    with torch.cuda.device(columns.device):
        _search[(triton.cdiv(num_outputs, OUTPUTS), num_matrices)](
            *(columns, importance, scale),
            *(*columns.stride(), *importance.stride()),
            num_inputs,
            num_outputs,
            INPUTS=triton.next_power_of_2(num_inputs),
            OUTPUTS=OUTPUTS,
            CODE_MIN=int4.CODE_MIN,
            CODE_MAX=int4.CODE_MAX,
            TRIED=int4.SCALES_TRIED,
            num_warps=WARPS,
        )
    return scale


# fmt: off
@triton.jit
def _search(
    columns_ptr, importance_ptr, scale_ptr,
    columns_b, columns_n, columns_o,
    importance_b, importance_n,
    num_inputs, num_outputs,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr, TRIED: tl.constexpr,
):
    # fmt: on
    matrix = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    whole, inside = outputs < num_outputs, inputs < num_inputs
    columns = tl.load(
        columns_ptr + matrix * columns_b + inputs[:, None] * columns_n + outputs * columns_o,
        mask=inside[:, None] & whole,
        other=0.0,
    )  # [INPUTS, OUTPUTS]
    importance = tl.load(
        importance_ptr + matrix * importance_b + inputs * importance_n, mask=inside, other=0.0
    )
    largest = tl.max(tl.abs(columns), axis=0)
    largest = tl.div_rn(largest, tl.full([OUTPUTS], 7.5, tl.float32)).to(tl.bfloat16).to(tl.float32)
    largest = tl.where(largest > 0, largest, 1.0)
    best = largest
    least = tl.full([OUTPUTS], float("inf"), tl.float32)
    fifty = tl.full([OUTPUTS], 50.0, tl.float32)
    for tried in range(TRIED):
        scale = (largest * tl.div_rn(fifty - tried, fifty)).to(tl.bfloat16).to(tl.float32)
        code = tl.minimum(tl.maximum(tl.div_rn(columns, scale[None, :]), CODE_MIN), CODE_MAX)
        code = (code + 12582912.0) - 12582912.0  # as in the sweep
        off = code * scale - columns
        error = tl.sum(off * off * importance[:, None], axis=0)
        best = tl.where(error < least, scale, best)
        least = tl.minimum(error, least)
    tl.store(scale_ptr + matrix * num_outputs + outputs, best.to(tl.bfloat16), mask=whole)
