"""The encode/decode pairs against bit-by-bit loops and against compressed-tensors."""

import math

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_graft.quant import fp8_block, int4, mxfp4
from references import decode_fp8_blocks, decode_int4, decode_mxfp4, e4m3, e8m0

quick = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)
E8M0_CODES = torch.arange(255, dtype=torch.uint8)  # 255 is NaN


def normal(*shape: int, seed: int, spread: bool = True) -> Tensor:
    """Normal values; with `spread` the columns' magnitudes differ by up to 2**16."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    if spread:
        values *= torch.exp2(torch.randint(-8, 9, shape[-1:], generator=generator))
    return values


def nearest(value: float, grid: list[float]) -> list[float]:
    """Return the one or, for a tie, two grid values closest to `value`."""
    least = min(abs(value - g) for g in grid)
    return [g for g in grid if abs(value - g) == least]


# INT4


@st.composite
def int4_codes(draw: st.DrawFn) -> Tensor:
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    outputs, words = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(seeds))
    shape = (*leading, outputs, 8 * words)
    return torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)


@quick
@given(int4_codes())
def test_int4_packs_to_the_words_of_compressed_tensors(codes: Tensor) -> None:
    words = int4.pack(codes)
    assert words.dtype == torch.int32
    assert torch.equal(words, pack_to_int32(codes, num_bits=4))
    assert torch.equal(int4.unpack(words), unpack_from_int32(words, 4, codes.shape))


@quick
@given(seeds, st.sampled_from([32, 128]))
def test_int4_encodes_to_the_nearest_code_within_range(seed: int, group_size: int) -> None:
    weight = normal(2, 3, 2 * group_size, seed=seed)
    scale = (0.3 * int4.group_scale(weight, group_size).float()).bfloat16()  # codes overflow
    codes = int4.encode(weight, scale)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    ratios = weight.unflatten(-1, (2, -1)) / scale.float().unsqueeze(-1)
    grid = [float(code) for code in range(-8, 8)]
    pairs = zip(codes.flatten().tolist(), ratios.flatten().tolist(), strict=True)
    assert all(code in nearest(ratio, grid) for code, ratio in pairs)
    assert ratios.max() > 8 and ratios.min() < -9, "the ends have to be passed to be tested"


@quick
@given(seeds, st.sampled_from([8, 32, 128]))
def test_int4_decode_is_code_times_the_groups_scale(seed: int, group_size: int) -> None:
    weight = normal(3, 2 * group_size, seed=seed)
    scale = int4.group_scale(weight, group_size)
    codes = int4.encode(weight, scale)
    decoded = int4.decode(codes, scale)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.double(), decode_int4(int4.pack(codes), scale, group_size))


@quick
@given(seeds)
def test_int4_group_scale_is_the_symmetric_rule_of_compressed_tensors(seed: int) -> None:
    weight = normal(3, 256, seed=seed)
    groups = weight.unflatten(-1, (-1, 128))
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=128)
    theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    assert torch.equal(int4.group_scale(weight, 128), theirs.bfloat16())


# FP8 in blocks

SHAPES = [(128, 128), (130, 257), (1, 1), (127, 300), (256, 5)]
FP8_GRID = [e4m3(byte) for byte in range(256) if not math.isnan(e4m3(byte))]


def fp8_scale(kind: str, weight: Tensor) -> Tensor:
    functions = {"bf16": fp8_block.block_scale, "e8m0": fp8_block.power_of_two_scale}
    return functions[kind](weight)


@pytest.mark.parametrize("kind", ["bf16", "e8m0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_decodes_as_the_loop_does(shape: tuple[int, int], kind: str) -> None:
    weight = normal(*shape, seed=sum(shape))
    scale = fp8_scale(kind, weight)
    assert scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    assert scale.dtype == (torch.bfloat16 if kind == "bf16" else torch.float8_e8m0fnu)
    codes = fp8_block.encode(weight, scale)
    decoded = fp8_block.decode(codes, scale)
    assert decoded.dtype == torch.float32 and decoded.shape == shape
    assert torch.equal(decoded.double(), decode_fp8_blocks(codes, scale))


@pytest.mark.parametrize("kind", ["bf16", "e8m0"])
@pytest.mark.parametrize("shape", [(130, 30), (3, 131)])
def test_fp8_encodes_to_the_nearest_code(shape: tuple[int, int], kind: str) -> None:
    weight = normal(*shape, seed=7)
    scale = fp8_scale(kind, weight)
    codes = fp8_block.encode(weight, scale).float()
    for r in range(shape[0]):
        for c in range(shape[1]):
            ratio = float(weight[r, c] / scale[r // 128, c // 128].float())
            assert codes[r, c].item() in nearest(ratio, FP8_GRID)


def test_fp8_saturates_instead_of_becoming_nan() -> None:
    weight = torch.tensor([[449.0, 1e30, math.inf, -465.0, -1e30, -math.inf, 447.0]])
    codes = fp8_block.encode(weight, torch.ones(1, 1)).float()
    assert codes.tolist() == [[448.0, 448.0, 448.0, -448.0, -448.0, -448.0, 448.0]]


# 448 is 0.875 * 2**9: just there the scale changes, so values beside it are tried on purpose.
_magnitudes = st.floats(2.0**-110, 2.0**120, width=32) | st.builds(
    lambda exponent, ulps: 448 * 2.0**exponent * (1 + ulps * 2.0**-23),
    st.integers(-110, 110),
    st.integers(-2, 2),
)


@settings(max_examples=400, deadline=None)
@given(_magnitudes, st.sampled_from([-1, 1]))
def test_fp8_power_of_two_scale_is_the_least_that_fits(magnitude: float, sign: int) -> None:
    weight = torch.tensor([[0.0, sign * magnitude]])
    scale = fp8_block.power_of_two_scale(weight).double().item()
    absmax = abs(weight[0, 1].item())
    assert math.log2(scale).is_integer()
    assert absmax / scale <= 448 < absmax / (scale / 2)


def test_e8m0_scales_are_exact_in_bfloat16() -> None:
    scale = E8M0_CODES.view(torch.float8_e8m0fnu)
    expected = torch.tensor([e8m0(code) for code in E8M0_CODES.tolist()], dtype=torch.float64)
    assert torch.equal(scale.to(torch.bfloat16).double(), expected)
    codes = torch.full((1, 1), 1.0).to(torch.float8_e4m3fn)
    decoded = [fp8_block.decode(codes, s.view(1, 1)).item() for s in scale]
    assert decoded == expected.tolist()


# MXFP4

ALL_CODES = torch.arange(256, dtype=torch.uint8).view(16, 16)  # every pair of nibbles; 32 inputs


@pytest.mark.parametrize("exponent", [0, 1, 100, 126, 127, 128, 150, 251, 252])
def test_mxfp4_decodes_every_code_exactly(exponent: int) -> None:
    scale = torch.full((16, 1), exponent, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    decoded = mxfp4.decode(ALL_CODES, scale)
    assert decoded.dtype == torch.float32 and decoded.shape == (16, 32)
    assert torch.equal(decoded.double(), decode_mxfp4(ALL_CODES, scale))
    assert torch.equal(decoded.bfloat16().float(), decoded), "exact in BF16 as well"


_powers = st.builds(
    lambda exponent, ulps: 2.0**exponent * (1 + ulps * 2.0**-23),
    st.integers(-100, 100),
    st.integers(-2, 2),
)


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32) | _powers, st.sampled_from([-1, 1]))
def test_mxfp4_scale_is_two_to_the_floor_of_log2_less_two(magnitude: float, sign: int) -> None:
    weight = torch.zeros(1, 32)
    weight[0, 5] = sign * magnitude
    scale = mxfp4.group_scale(weight)
    assert scale.dtype == torch.float8_e8m0fnu
    exponent = 0
    while 2.0**exponent > weight.abs().max().item():
        exponent -= 1
    while 2.0 ** (exponent + 1) <= weight.abs().max().item():
        exponent += 1
    assert scale.double().item() == 2.0 ** (exponent - 2)


def test_mxfp4_bytes_are_those_of_compressed_tensors() -> None:
    ones = torch.full((16, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = unpack_fp4_from_uint8(ALL_CODES, 16, 32, dtype=torch.float32)
    assert torch.equal(mxfp4.decode(ALL_CODES, ones), values)
    assert torch.equal(mxfp4.encode(values, ones), pack_fp4_to_uint8(values))
