"""Names and shapes against those of transformers' modules."""

import json
from pathlib import Path

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
from mtp_graft.errors import GraftError
from mtp_graft.serving.doctor.checkpoint import canonical_name


@pytest.fixture(scope="module")
def base_state(tiny_model: Path) -> dict[str, Tensor]:
    config = DeepseekV4Config.from_pretrained(tiny_model / "make")
    with torch.device("meta"):
        return DeepseekV4ForCausalLM(config).state_dict()


def test_transformers_reads_every_renamed_tensor_into_where_it_came_from(
    base_state: dict[str, Tensor],
) -> None:
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


def test_modules_have_the_tensors_that_the_config_asks_for(
    base_state: dict[str, Tensor], tiny_model: Path
) -> None:
    settings = json.loads((tiny_model / "base" / "config.json").read_text())
    with torch.device("meta"):
        head = MTPHead(DeepseekV4Config.from_pretrained(tiny_model / "make")).state_dict()
    found = {n: tuple(t.shape) for n, t in names.head_from_module(head).items()}
    assert found == head_shapes(settings)
    base = [names.split_experts(name, tensor) for name, tensor in base_state.items()]
    assert {n: tuple(t.shape) for part in base for n, t in part.items()} == base_shapes(settings)


def test_upstream_without_a_head_or_with_three_blocks_is_refused() -> None:
    with pytest.raises(GraftError, match=r"has no mtp\.\* tensors"):
        names.upstream_head_names(["layers.0.attn.wq_a.weight"], "upstream")
    with pytest.raises(GraftError, match="DSpark"):
        names.upstream_head_names([f"mtp.{i}.norm.weight" for i in range(3)], "upstream")
