"""The encode/decode pairs against bit-by-bit loops and against compressed-tensors."""

import math
import operator
import random

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


def normal(*shape: int, seed: int) -> Tensor:
    """Return normal values whose magnitudes differ from column to column, by up to 2**16."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values * torch.exp2(torch.randint(-8, 9, shape[-1:], generator=generator))


def nearest(value: float, grid: list[float]) -> list[float]:
    """Return the one or, for a tie, two grid values closest to `value`."""
    least = min(abs(value - g) for g in grid)
    return [g for g in grid if abs(value - g) == least]


# INT4


@quick
@given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 4))
def test_int4_packs_to_the_words_of_compressed_tensors(
    seed: int, leading: list[int], num_words: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (*leading, 8 * num_words)
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
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

FP8_GRID = [e4m3(byte) for byte in range(256) if not math.isnan(e4m3(byte))]
RULES = {torch.bfloat16: fp8_block.block_scale, torch.float8_e8m0fnu: fp8_block.power_of_two_scale}


@pytest.mark.parametrize("dtype", RULES)
@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (1, 1), (3, 131), (256, 5)])
def test_fp8_encodes_to_the_nearest_code_and_decodes_as_the_loop_does(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = normal(*shape, seed=sum(shape))
    scale = RULES[dtype](weight)
    assert scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    assert scale.dtype == dtype
    codes = fp8_block.encode(weight, scale)
    decoded = fp8_block.decode(codes, scale)
    assert decoded.dtype == torch.float32 and decoded.shape == shape
    assert torch.equal(decoded.double(), decode_fp8_blocks(codes, scale))
    generator = random.Random(0)
    for _ in range(300):
        r, c = generator.randrange(shape[0]), generator.randrange(shape[1])
        ratio = float(weight[r, c] / scale[r // 128, c // 128].float())
        assert codes[r, c].item() in nearest(ratio, FP8_GRID)


def test_fp8_saturates_instead_of_becoming_nan() -> None:
    weight = torch.tensor([[449.0, 1e30, math.inf, -465.0, -1e30, -math.inf, 447.0]])
    codes = fp8_block.encode(weight, torch.ones(1, 1)).float()
    assert codes.tolist() == [[448.0, 448.0, 448.0, -448.0, -448.0, -448.0, 448.0]]


def near_powers_of_two(factor: float) -> st.SearchStrategy[float]:
    """Values beside those at which a power-of-two scale changes, of either sign, and others."""
    beside = st.builds(
        lambda exponent, ulps: factor * 2.0**exponent * (1 + ulps * 2.0**-23),
        st.integers(-100, 100),
        st.integers(-2, 2),
    )
    magnitudes = st.floats(2.0**-100, 2.0**110, width=32) | beside
    return st.builds(operator.mul, magnitudes, st.sampled_from([-1.0, 1.0]))


@settings(max_examples=400, deadline=None)
@given(near_powers_of_two(448))
def test_fp8_power_of_two_scale_is_the_least_that_fits(value: float) -> None:
    weight = torch.tensor([[0.0, value]])
    scale = fp8_block.power_of_two_scale(weight).double().item()
    absmax = abs(weight[0, 1].item())
    assert math.log2(scale).is_integer()
    assert absmax / scale <= 448 < absmax / (scale / 2)


def test_e8m0_scales_are_exact_in_bfloat16() -> None:
    scale = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)  # 255 is NaN
    expected = [e8m0(code) for code in range(255)]
    assert scale.to(torch.bfloat16).double().tolist() == expected
    codes = torch.full((1, 1), 1.0).to(torch.float8_e4m3fn)
    assert [fp8_block.decode(codes, s.view(1, 1)).item() for s in scale] == expected


# MXFP4

ALL_CODES = torch.arange(256, dtype=torch.uint8).view(16, 16)  # every pair of nibbles; 32 inputs


@pytest.mark.parametrize("exponent", [0, 1, 100, 126, 127, 128, 150, 251, 252])
def test_mxfp4_decodes_every_code_exactly(exponent: int) -> None:
    scale = torch.full((16, 1), exponent, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    decoded = mxfp4.decode(ALL_CODES, scale)
    assert decoded.dtype == torch.float32 and decoded.shape == (16, 32)
    assert torch.equal(decoded.double(), decode_mxfp4(ALL_CODES, scale))
    assert torch.equal(decoded.bfloat16().float(), decoded), "exact in BF16 as well"


@settings(max_examples=200, deadline=None)
@given(near_powers_of_two(1))
def test_mxfp4_scale_is_two_to_the_floor_of_log2_less_two(value: float) -> None:
    weight = torch.zeros(1, 32)
    weight[0, 5] = value
    scale = mxfp4.group_scale(weight)
    assert scale.dtype == torch.float8_e8m0fnu
    scaled = weight.abs().max().double().item() / scale.double().item()
    assert math.log2(scale.double().item()).is_integer() and 4 <= scaled < 8


def test_mxfp4_bytes_are_those_of_compressed_tensors() -> None:
    ones = torch.full((16, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = unpack_fp4_from_uint8(ALL_CODES, 16, 32, dtype=torch.float32)
    assert torch.equal(mxfp4.decode(ALL_CODES, ones), values)
    assert torch.equal(mxfp4.encode(values, ones), pack_fp4_to_uint8(values))
