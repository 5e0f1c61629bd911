"""Upstream's tensors decoded, and parts that do not fit; `test_verify.py` has the variants."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4 import variants
from mtp_graft.dsv4.variants import decode_head, store_head
from mtp_graft.errors import GraftError
from references import decode_fp8_blocks, decode_mxfp4

MATRICES = tuple(f"mtp.0.ffn.experts.7.{w}" for w in ("w1", "w2", "w3"))
EXPERT = MATRICES[0]
WANTED = (*MATRICES, "mtp.0.ffn.shared_experts.w2.", "mtp.0.attn.", "mtp.0.e_proj.")
WANTED += ("mtp.0.hc_", "mtp.0.ffn.gate.")


@pytest.fixture(scope="module")
def upstream(tiny_model: Path) -> dict[str, Tensor]:
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
def test_parts_that_do_not_fit_are_an_error_that_names_the_module(
    upstream: dict[str, Tensor],
    name: str,
    damage: Callable[[Tensor], Tensor] | None,
    message: str,
    use: Callable[[dict[str, Tensor]], object],
) -> None:
    head = dict(upstream)
    tensor = head.pop(name)
    if damage is not None:
        head[name] = damage(tensor)
    with pytest.raises(GraftError, match=message):
        use(head)
