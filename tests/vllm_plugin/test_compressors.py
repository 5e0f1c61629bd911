"""FP8 compressor weights come out decoded and without their scales; all else is untouched."""

import random

import pytest
import torch
from torch import Tensor

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.compressors import decode_compressors
from references import decode_fp8_blocks

MODULES = ("compressor.wkv", "compressor.wgate", "indexer.compressor.wkv", "indexer.weights_proj")
MODULES = tuple(f"layers.2.attn.{name}" for name in MODULES)
RANDOM = torch.Generator().manual_seed(0)
BF16_WEIGHT = torch.ones(3, 4, dtype=torch.bfloat16)


def fp8_pair() -> tuple[Tensor, Tensor]:
    """Return codes [130, 257], neither of whole blocks, and scales [2, 3]."""
    codes = (100 * torch.randn(130, 257, generator=RANDOM)).to(torch.float8_e4m3fn)
    return codes, torch.rand(2, 3, generator=RANDOM).bfloat16()


CODES, SCALE = fp8_pair()
QUANTIZED = ("layers.2.attn.wkv", "layers.2.attn.indexer.wq_b")
OTHERS = {
    **{f"{module}.weight": CODES for module in QUANTIZED},
    **{f"{module}.weight_scale": SCALE for module in QUANTIZED},
    "layers.3.attn.compressor.wkv.weight": BF16_WEIGHT,
    "layers.3.attn.compressor.norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "layers.3.attn.compressor.ape": torch.ones(4, 3),
    "layers.3.attn.indexer.weights_proj.weight": BF16_WEIGHT,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pairs_in_any_order_are_decoded_as_the_loop_does(dtype: torch.dtype) -> None:
    stored, expected = dict(OTHERS), {}
    for module in MODULES:
        codes, scale = fp8_pair()
        stored |= {f"{module}.weight": codes, f"{module}.weight_scale": scale.to(dtype)}
        expected[f"{module}.weight"] = decode_fp8_blocks(codes, scale).to(torch.bfloat16)
    order = list(stored.items())
    random.Random(0).shuffle(order)
    given = list(decode_compressors(order))
    assert len(given) == len(OTHERS) + len(expected)
    for name, tensor in given:
        assert tensor is OTHERS[name] if name in OTHERS else torch.equal(tensor, expected[name])


@pytest.mark.parametrize("weight_first", [True, False])
def test_a_weight_is_given_as_soon_as_its_pair_is_whole(weight_first: bool) -> None:
    pair = [(f"{MODULES[0]}.weight", CODES), (f"{MODULES[0]}.weight_scale", SCALE)]
    first, second = pair if weight_first else reversed(pair)
    between, after = ("embed.weight", torch.ones(1)), ("norm.weight", torch.ones(1))
    given = [name for name, _ in decode_compressors([first, between, second, after])]
    assert given == ["embed.weight", f"{MODULES[0]}.weight", "norm.weight"]


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (CODES, None, "an FP8 weight comes alone"),
        (BF16_WEIGHT, SCALE, "an FP8 weight_scale comes alone"),
        (CODES, torch.ones(130, 1), r"its scale is \[130, 1\], expected \[2, 3\]"),
    ],
)
def test_pairs_that_misfit_are_refused(weight: Tensor, scale: Tensor | None, message: str) -> None:
    stored = {f"{MODULES[3]}.weight": weight, f"{MODULES[3]}.weight_scale": scale}
    given = [(name, tensor) for name, tensor in stored.items() if tensor is not None]
    with pytest.raises(GraftError, match=rf"^{MODULES[3]}: {message}"):
        list(decode_compressors([*given, *OTHERS.items()]))
