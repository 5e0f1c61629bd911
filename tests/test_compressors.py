"""FP8 compressor weights come out decoded and without their scales; all else is untouched."""

import random
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from mtp_graft.errors import GraftError
from mtp_graft.quant import fp8_block
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
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    scale = fp8_block.block_scale(weight).to(dtype)
    return fp8_block.encode(weight, scale), scale


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", range(4))
def test_pairs_in_any_order_are_decoded_as_the_loop_does(seed: int, dtype: torch.dtype) -> None:
    stored = others()
    for number, stem in enumerate(STEMS):
        stored[f"{stem}.weight"], stored[f"{stem}.weight_scale"] = fp8_pair(number, dtype)
    order = list(stored.items())
    random.Random(seed).shuffle(order)
    given = list(decode_compressors(order))
    assert len(given) == len(dict(given)) == len(others()) + len(STEMS)
    for name, tensor in given:
        stem = name.removesuffix(".weight")
        if stem in STEMS:
            expected = decode_fp8_blocks(stored[name], stored[f"{stem}.weight_scale"])
            assert tensor.dtype == torch.bfloat16
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


def test_a_base_without_fp8_compressors_passes_as_it_is() -> None:
    stored = list(others().items())
    given = list(decode_compressors(stored))
    assert [name for name, _ in given] == [name for name, _ in stored]
    assert all(found is tensor for (_, found), (_, tensor) in zip(given, stored, strict=True))


def test_half_a_pair_is_an_error_that_names_it() -> None:
    codes, scale = fp8_pair(0)
    weight = f"{STEMS[3]}.weight"
    with pytest.raises(GraftError, match=rf"^{weight}: there is no \.weight_scale beside it"):
        list(decode_compressors([(weight, codes), *others().items()]))
    with pytest.raises(GraftError, match=rf"^{weight}_scale: there is no FP8 weight"):
        list(decode_compressors([(f"{weight}_scale", scale), *others().items()]))
    bf16 = [(weight, codes.to(torch.bfloat16)), (f"{weight}_scale", scale)]
    with pytest.raises(GraftError, match=rf"^{weight}_scale: there is no FP8 weight"):
        list(decode_compressors(bf16))


def test_scales_of_other_groups_are_refused() -> None:
    codes, _ = fp8_pair(0)
    per_row = [("layers.2.attn.compressor.wkv.weight", codes)]
    per_row += [("layers.2.attn.compressor.wkv.weight_scale", torch.ones(SHAPE[0], 1))]
    with pytest.raises(GraftError, match=r"wkv\.weight: its scale is \[130, 1\], expected \[2, 3"):
        list(decode_compressors(per_row))


@pytest.mark.vllm
def test_the_target_loads_a_base_with_fp8_compressors_strictly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stock loader, which has no parameter for a scale, is given whole BF16 weights alone."""
    pytest.importorskip("vllm", reason="the target is vLLM's: install the cpu extra")
    from mtp_graft.vllm_plugin.cpu import target

    def load(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        parameters = {name.replace("/", "."): p for name, p in model.named_parameters()}
        names = set()
        for name, tensor in weights:
            parameters[name].weight_loader(parameters[name], tensor)
            names.add(name)
        return names

    monkeypatch.setattr(target.stock.DeepseekV4ForCausalLM, "load_weights", load)
    model = target.DeepseekV4ForCausalLM.__new__(target.DeepseekV4ForCausalLM)
    nn.Module.__init__(model)
    empty = nn.Parameter(torch.zeros(SHAPE, dtype=torch.bfloat16), requires_grad=False)
    model.register_parameter(f"{STEMS[0]}.weight".replace(".", "/"), empty)
    codes, scale = fp8_pair(0)
    checkpoint = [(f"{STEMS[0]}.weight_scale", scale), (f"{STEMS[0]}.weight", codes)]
    model.load_weights([*checkpoint, ("mtp.0.enorm.weight", torch.ones(1))])
    assert torch.equal(empty, decode_fp8_blocks(codes, scale).to(torch.bfloat16))
    with pytest.raises(GraftError, match="there is no FP8 weight"):
        model.load_weights(checkpoint[:1])
