"""Number formats against bit-by-bit loops and compressed-tensors, and the head stored in them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_graft import quant
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4 import variants
from mtp_graft.dsv4.variants import decode_head, store_head
from mtp_graft.errors import GraftError
from mtp_graft.quant import int4
from references import decode_fp8_blocks, decode_int4, decode_mxfp4

quick = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int) -> Tensor:
    """Return normal values whose magnitudes differ from column to column, by up to 2**16."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values * torch.exp2(torch.randint(-8, 9, shape[-1:], generator=generator))


@quick
@given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 4))
def test_int4_packs_as_compressed_tensors(seed: int, leading: list[int], num_words: int) -> None:
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
    ratios = (weight.unflatten(-1, (2, -1)) / scale.float().unsqueeze(-1)).flatten(-2)
    least = (ratios.unsqueeze(-1) - torch.arange(-8, 8)).abs().amin(dim=-1)
    assert torch.equal((ratios - codes).abs(), least)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (1, 1)])
def test_fp8_decodes_as_the_loop_does(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes = normal(*shape, seed=1).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = normal(*(math.ceil(size / 128) for size in shape), seed=0).abs().to(dtype)
    decoded = quant.decode_fp8(codes, scale)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.double(), decode_fp8_blocks(codes, scale))


@pytest.mark.parametrize("exponent", [0, 1, 100, 126, 127, 128, 150, 251, 252])
def test_mxfp4_decodes_every_code_exactly(exponent: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)  # every pair of nibbles; 32 inputs
    scale = torch.full((16, 1), exponent, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    decoded = quant.decode_mxfp4(codes, scale)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.double(), decode_mxfp4(codes, scale))
    assert torch.equal(decoded.bfloat16().float(), decoded), "exact in BF16 as well"


MATRICES = tuple(f"mtp.0.ffn.experts.7.{w}" for w in ("w1", "w2", "w3"))
EXPERT = MATRICES[0]
WANTED = (*MATRICES, "mtp.0.ffn.shared_experts.w2.", "mtp.0.attn.", "mtp.0.e_proj.")
WANTED += ("mtp.0.hc_", "mtp.0.ffn.gate.")
Head = dict[str, Tensor]


@pytest.fixture(scope="module")
def upstream(tiny_model: Path) -> Head:
    """One expert and a tensor of every other kind."""
    loaded = load_tensors(tiny_model / "upstream")
    return {name: tensor for name, tensor in loaded.items() if name.startswith(WANTED)}


def test_upstream_decodes_to_what_its_formats_define(upstream: dict[str, Tensor]) -> None:
    decoded = decode_head(upstream)
    assert set(decoded) == {name for name in upstream if not name.endswith(".scale")}
    assert all(tensor.dtype == torch.float32 for tensor in decoded.values())
    for module, decode in ((EXPERT, decode_mxfp4), ("mtp.0.attn.wkv", decode_fp8_blocks)):
        expected = decode(upstream[f"{module}.weight"], upstream[f"{module}.scale"])
        assert torch.equal(decoded[f"{module}.weight"].double(), expected), module
    assert torch.equal(decoded["mtp.0.hc_attn_fn"], upstream["mtp.0.hc_attn_fn"])


def test_gptq_without_an_expert_is_an_error_that_names_it(upstream: dict[str, Tensor]) -> None:
    rounded = store_head(upstream, "rtn")
    del rounded[f"{EXPERT}.weight_scale"]
    with pytest.raises(GraftError, match=rf"{EXPERT}\.weight_scale: not among the quantized"):
        store_head(upstream, "gptq", rounded)


def test_another_group_size_gives_scales_of_that_group(upstream: dict[str, Tensor]) -> None:
    stored = store_head(upstream, "rtn", group_size=64)
    assert stored[f"{EXPERT}.weight_scale"].shape == (256, 4)
    assert decode_head(stored, group_size=64)[f"{EXPERT}.weight"].shape == (256, 256)
    with pytest.raises(GraftError, match=r"scale \[256, 4\].*, expected .*\[256, 2\].*group 128"):
        decode_head(stored)


def not_finite(scale: Tensor) -> Tensor:
    spoilt = scale.view(torch.uint8).clone()
    spoilt[0, 0] = 255
    return spoilt.view(torch.float8_e8m0fnu)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (f"{EXPERT}.scale", None, rf"{EXPERT}: has weight .*int8; expected a weight with"),
        (f"{EXPERT}.weight", None, rf"{EXPERT}: has scale .*; expected a weight with"),
        (f"{EXPERT}.scale", lambda t: t[:, :4], r"scale \[256, 4\].*, expected .*\[256, 8\].*32"),
        (f"{EXPERT}.scale", Tensor.float, r"scale .* torch.float32, expected .* torch.uint8"),
        (f"{EXPERT}.scale", not_finite, rf"{EXPERT}: has a scale that is not finite"),
        (f"{EXPERT}.weight", lambda t: t[:, :-8], r"240 inputs are no multiple of .* 32"),
        ("mtp.0.attn.wkv.scale", lambda t: t[:3], r"wkv: .*scale \[3, 2\].*expected .*\[4, 2\]"),
    ],
)
@pytest.mark.parametrize("use", [lambda head: store_head(head, "rtn"), variants.decode_head])
def test_misfits_are_named(upstream: Head, name: str, damage: Any, message: str, use: Any) -> None:
    head = dict(upstream)
    tensor = head.pop(name)
    if damage is not None:
        head[name] = damage(tensor)
    with pytest.raises(GraftError, match=message):
        use(head)
