"""FP8 compressor weights come out decoded and without their scales; all else is untouched."""

import random

import pytest
import torch
from torch import Tensor

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.compressors import decode_compressors
from references import decode_fp8_blocks

STEMS = (
    "layers.2.attn.compressor.wkv",
    "layers.2.attn.compressor.wgate",
    "layers.2.attn.indexer.compressor.wkv",
    "layers.2.attn.indexer.weights_proj",
)
SHAPE = (130, 257)  # [O, I], neither of whole blocks


def fp8_pair(seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Return codes [130, 257] and scales [2, 3]."""
    generator = torch.Generator().manual_seed(seed)
    codes = (100 * torch.randn(SHAPE, generator=generator)).to(torch.float8_e4m3fn)
    return codes, torch.rand(2, 3, generator=generator).bfloat16().to(dtype)


def others() -> dict[str, Tensor]:
    """Return what has to pass as it is: other FP8 linears, BF16 compressors, their norms."""
    codes, scale = fp8_pair(99)
    return {
        "layers.2.attn.wkv.weight": codes,
        "layers.2.attn.wkv.weight_scale": scale,
        "layers.2.attn.indexer.wq_b.weight": codes,
        "layers.2.attn.indexer.wq_b.weight_scale": scale,
        "layers.3.attn.compressor.wkv.weight": torch.ones(3, 4, dtype=torch.bfloat16),
        "layers.3.attn.compressor.norm.weight": torch.ones(3, dtype=torch.bfloat16),
        "layers.3.attn.compressor.ape": torch.ones(4, 3),
        "layers.3.attn.indexer.weights_proj.weight": torch.ones(3, 4, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("stems", [STEMS, ()], ids=["FP8", "BF16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pairs_in_any_order_are_decoded_as_the_loop_does(
    dtype: torch.dtype, stems: tuple[str, ...]
) -> None:
    stored = others()
    for number, stem in enumerate(stems):
        stored[f"{stem}.weight"], stored[f"{stem}.weight_scale"] = fp8_pair(number, dtype)
    order = list(stored.items())
    random.Random(0).shuffle(order)
    given = list(decode_compressors(order))
    assert len(given) == len(dict(given)) == len(others()) + len(stems)
    for name, tensor in given:
        stem = name.removesuffix(".weight")
        if stem in stems:
            expected = decode_fp8_blocks(stored[name], stored[f"{stem}.weight_scale"])
            assert torch.equal(tensor, expected.to(torch.bfloat16))
        else:
            assert tensor is stored[name]


@pytest.mark.parametrize("weight_first", [True, False])
def test_a_weight_is_given_as_soon_as_its_pair_is_whole(weight_first: bool) -> None:
    codes, scale = fp8_pair(0)
    pair = [(f"{STEMS[0]}.weight", codes), (f"{STEMS[0]}.weight_scale", scale)]
    first, second = pair if weight_first else reversed(pair)
    between, after = ("embed.weight", torch.ones(1)), ("norm.weight", torch.ones(1))
    given = [name for name, _ in decode_compressors([first, between, second, after])]
    assert given == ["embed.weight", f"{STEMS[0]}.weight", "norm.weight"]


CODES, SCALE = fp8_pair(0)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"weight": CODES}, "an FP8 weight comes alone"),
        ({"weight_scale": SCALE}, "an FP8 weight_scale comes alone"),
        (
            {"weight": CODES.to(torch.bfloat16), "weight_scale": SCALE},
            "an FP8 weight_scale comes alone",
        ),
        (
            {"weight": CODES, "weight_scale": torch.ones(SHAPE[0], 1)},
            r"its scale is \[130, 1\], expected \[2, 3\]",
        ),
    ],
)
def test_half_a_pair_or_scales_of_other_groups_are_errors(
    pair: dict[str, Tensor], message: str
) -> None:
    stored = {f"{STEMS[3]}.{part}": tensor for part, tensor in pair.items()}
    with pytest.raises(GraftError, match=rf"^{STEMS[3]}: {message}"):
        list(decode_compressors([*stored.items(), *others().items()]))
