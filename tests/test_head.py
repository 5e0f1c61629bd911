"""The head's names, shapes and forward pass against transformers' own modules."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.dsv4 import names
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.names import base_shapes, head_shapes
from mtp_graft.serving.doctor.checkpoint import canonical_name


@pytest.fixture(scope="module")
def base_state(tiny_model: Path) -> dict[str, Tensor]:
    config = DeepseekV4Config.from_pretrained(tiny_model / "make")
    with torch.device("meta"):
        return DeepseekV4ForCausalLM(config).state_dict()


def test_transformers_reads_every_renamed_tensor(base_state: dict[str, Tensor]) -> None:
    table = get_checkpoint_conversion_mapping("deepseek_v4")
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    assert len(renamings) > 30 and len(converters) == 2
    for name, tensor in base_state.items():
        natives = names.split_experts(name, tensor)
        assert len(natives) == {"gate_up_proj": 128, "down_proj": 64}.get(name.split(".")[-1], 1)
        for native in natives:
            theirs, _ = rename_source_key(native, renamings, converters, "model", base_state)
            assert theirs == name, native
            assert canonical_name(native, 4) == native
        if len(natives) == 1:
            assert [canonical_name(name, 4)] == [*natives]


def test_modules_are_as_the_config_asks(base_state: dict[str, Tensor], tiny_model: Path) -> None:
    settings = json.loads((tiny_model / "base" / "config.json").read_text())
    with torch.device("meta"):
        head = MTPHead(DeepseekV4Config.from_pretrained(tiny_model / "make")).state_dict()
    found = {n: tuple(t.shape) for n, t in names.head_from_module(head).items()}
    assert found == head_shapes(settings)
    base = [names.split_experts(name, tensor) for name, tensor in base_state.items()]
    assert {n: tuple(t.shape) for part in base for n, t in part.items()} == base_shapes(settings)


WINDOW = 4


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> DeepseekV4Config:
    settings = json.loads((tiny_model / "make" / "config.json").read_text())
    settings |= {"hidden_size": 64, "q_lora_rank": 32, "o_lora_rank": 16, "head_dim": 128}
    settings |= {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2}
    return DeepseekV4Config(**settings | {"sliding_window": WINDOW, "vocab_size": 50})


@pytest.fixture(scope="module")
def head(config: DeepseekV4Config) -> MTPHead:
    torch.manual_seed(3)
    head = MTPHead(config).eval()
    for name, tensor in head.state_dict().items():
        # Nothing is left at a neutral value: norms, sinks, biases and scales all matter.
        noise = torch.randn(tensor.shape) / math.sqrt(max(tensor.shape[-1], 1))
        tensor.copy_(1 + noise if "norm" in name or name.endswith("scale") else noise)
    return head


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("tokens", [1, WINDOW, WINDOW + 1, 11])
@torch.no_grad()
def test_head_is_transformers_layer(tokens: int, first: int, head: MTPHead, config: Any) -> None:
    generator = torch.Generator().manual_seed(tokens)
    residual = 2 * torch.randn(2, tokens, 4, config.hidden_size, generator=generator)
    embeds = torch.randn(2, tokens, config.hidden_size, generator=generator)
    positions = torch.arange(first, first + tokens).expand(2, -1)
    eager = copy.deepcopy(head.layer)
    eager.self_attn.config._attn_implementation = "eager"
    mask = torch.full((tokens, tokens), -math.inf)
    for t in range(tokens):
        mask[t, max(0, t - WINDOW + 1) : t + 1] = 0.0
    streams = torch.empty_like(residual)
    for t in range(tokens):
        embed = embeds[:, t] if first + t > 0 else torch.zeros_like(embeds[:, t])
        for s in range(4):
            streams[:, t, s] = head.h_proj(rms_norm(residual[:, t, s], head.hnorm.weight))
            streams[:, t, s] += head.e_proj(rms_norm(embed, head.enorm.weight))
    rotary = head.rotary_emb(embeds, position_ids=positions, layer_type="main")
    expected = eager(
        streams,
        position_embeddings={"main": rotary},
        position_ids=positions,
        attention_mask=mask[None, None],
    )
    found = head(residual, embeds, positions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
