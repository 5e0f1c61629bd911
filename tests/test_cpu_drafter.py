"""The drafter's own part on a CPU, its decoder layer taken out, against transformers in float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the drafter is made of vLLM's layers: install the cpu extra")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM for another platform than the CPU", allow_module_level=True)

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4 import DeepseekV4Config
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.mhc import HCHeadOp
from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUIndexerMetadataBuilder as Builder

from mtp_graft.dsv4.head import MTPHead
from mtp_graft.vllm_plugin.cpu import drafter
from mtp_graft.vllm_plugin.cpu.indexer import flatten_drafts
from mtp_graft.vllm_plugin.cpu.order_free import free_from_order
from vllm_layers import one_rank_group

pytestmark = pytest.mark.vllm


class Through(nn.Module):
    """A decoder layer that changes nothing."""

    use_fused_mhc = False

    def forward(self, x: Tensor, **_others: Any) -> tuple[Tensor, None, None, None]:
        return x, None, None, None


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank_group(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> MTPHead:
    """Our replay's head in float64 with random weights that BF16 can hold."""
    head = MTPHead(DeepseekV4Config.from_pretrained(tiny_model / "base"))
    head.layer = nn.Module()
    head.layer.forward = lambda streams, **_others: streams  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.data = (values * scale).bfloat16().double()
    return head.double().requires_grad_(False)


@pytest.fixture(scope="module")
def head(reference: MTPHead) -> drafter.MTPLayer:
    """vLLM's layers put together by the plugin, with the same weights."""
    size = reference.e_proj.weight.shape[0]
    layer = drafter.MTPLayer.__new__(drafter.MTPLayer)
    nn.Module.__init__(layer)
    layer.config = DeepseekV4Config(hidden_size=size, hc_mult=4)
    with set_current_vllm_config(VllmConfig()):
        layer.hc_head = HCHeadOp()
        shared = nn.Module()
        shared.norm = RMSNorm(size, eps=layer.config.rms_norm_eps)
        layer.shared_head = shared
        for name in ("enorm", "hnorm"):
            setattr(layer, name, RMSNorm(size, eps=layer.config.rms_norm_eps))
        for name in ("e_proj", "h_proj"):
            projection = ReplicatedLinear(
                size, size, bias=False, return_bias=False, params_dtype=torch.bfloat16
            )
            projection.weight.data.copy_(getattr(reference, name).weight)
            setattr(layer, name, projection)
    free_from_order(layer)
    for projection in (layer.e_proj, layer.h_proj):
        projection.quant_method.process_weights_after_loading(projection)
    for ours, theirs in (
        (layer.enorm, reference.enorm),
        (layer.hnorm, reference.hnorm),
        (shared.norm, reference.norm),
    ):
        ours.weight = nn.Parameter(theirs.weight.data.bfloat16(), requires_grad=False)
    mixing = {name.rpartition("hc_")[2]: p for name, p in reference.hc_head.named_parameters()}
    for name in ("fn", "base", "scale"):
        setattr(layer, f"hc_head_{name}", nn.Parameter(mixing[name].float(), requires_grad=False))
    layer.mtp_block = Through()
    return layer


def inputs(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions [T] from 0, a residual stream [T, 4, D] and embeddings [T, D]."""
    generator = torch.Generator().manual_seed(num_tokens)
    streams = torch.randn(num_tokens, 4, 256, generator=generator).bfloat16()
    return (
        torch.arange(num_tokens),
        streams,
        torch.randn(num_tokens, 256, generator=generator).bfloat16(),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_the_heads_input_is_made_of_residual_and_embedding(
    head: drafter.MTPLayer, reference: MTPHead, num_tokens: int
) -> None:
    positions, streams, embeds = inputs(num_tokens)
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    found = head(ids, positions, streams.flatten(1), embeds)
    expected = reference(streams[None].double(), embeds[None].double(), positions[None])[0]
    assert found.shape == (num_tokens, 4 * 256)
    assert relative_error(found, expected.flatten(1)) < 6e-3  # BF16 after each of three steps
    without = reference(streams[None].double(), 0 * embeds[None].double(), positions[None])[0]
    assert relative_error(found[:1], without[:1].flatten(1)) < 6e-3, "no embedding at position 0"
    if num_tokens > 1:
        assert relative_error(found[1:], without[1:].flatten(1)) > 0.1


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_the_streams_collapse_as_in_transformers(
    head: drafter.MTPLayer, reference: MTPHead, num_tokens: int
) -> None:
    _, streams, _ = inputs(num_tokens)
    found = head.collapse(streams.flatten(1))
    expected = reference.norm(reference.hc_head(streams[None].double()))[0]
    assert relative_error(found, expected) < 6e-3


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("mtp.0.e_proj.weight_scale", "e_proj.weight_scale"),
        ("mtp.0.enorm.weight", "enorm.weight"),
        ("mtp.0.hc_head_fn", "hc_head_fn"),
        ("mtp.0.norm.weight", "shared_head.norm.weight"),
        ("mtp.0.attn.wq_b.weight", "mtp_block.attn.wq_b.weight"),
        ("mtp.0.attn_norm.weight", "mtp_block.attn_norm.weight"),
        ("mtp.0.hc_attn_fn", "mtp_block.hc_attn_fn"),
        ("mtp.0.ffn.gate.bias", "mtp_block.ffn.gate.e_score_correction_bias"),
        ("mtp.0.ffn.shared_experts.w2.weight", "mtp_block.ffn.shared_experts.down_proj.weight"),
        ("mtp.0.ffn.shared_experts.w1.weight", "mtp_block.ffn.shared_experts.w1.weight"),
    ],
)
def test_a_tensors_place_in_the_drafter(name: str, module: str) -> None:
    assert drafter._module_name(name) == module


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_its_heads_sinks_and_padding_stays(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(drafter, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(drafter, "get_tensor_model_parallel_rank", lambda: rank)
    padded = nn.Parameter(torch.full((5,), -torch.inf), requires_grad=False)
    drafter._load_sinks(padded, torch.arange(4.0))
    assert padded.tolist() == [2.0 * rank, 2.0 * rank + 1, *[-torch.inf] * 3]


@pytest.mark.parametrize(("k", "flattens"), [(0, False), (1, True), (2, True)])
def test_the_indexer_flattens_whenever_there_are_drafts(
    monkeypatch: pytest.MonkeyPatch, k: int, flattens: bool
) -> None:
    def stock(self: Any, drafts: int) -> None:
        self.num_speculative_tokens, self.use_flattening = drafts, drafts > 1

    monkeypatch.setattr(Builder, "__init__", stock)
    flatten_drafts()
    flatten_drafts()  # a second model in the same process
    builder = Builder.__new__(Builder)
    Builder.__init__(builder, k)
    assert builder.use_flattening is flattens
