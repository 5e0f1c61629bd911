"""Names and shapes against transformers, the bundled checkpoints and the format's description."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.checkpoint.shards import read_meta
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.head_shapes import base_shapes, head_shapes, stored_as
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.errors import GraftError

ATTENTION = [f"attn.{linear}" for linear in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")]


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> dict[str, object]:
    return json.loads((tiny_model / "base" / "config.json").read_text())


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


def test_modules_have_the_tensors_that_the_config_asks_for(
    base_state: dict[str, Tensor], tiny_model: Path, settings: dict[str, object]
) -> None:
    with torch.device("meta"):
        head = MTPHead(DeepseekV4Config.from_pretrained(tiny_model / "make")).state_dict()
    found = {n: tuple(t.shape) for n, t in names.head_from_module(head).items()}
    assert found == head_shapes(settings)
    base = [names.split_experts(name, tensor) for name, tensor in base_state.items()]
    assert {n: tuple(t.shape) for part in base for n, t in part.items()} == base_shapes(settings)


def test_bundled_checkpoints_store_them_as_their_names_say(
    tiny_model: Path, settings: dict[str, object]
) -> None:
    folder = tiny_model / "base"
    base = {n: (t.shape, t.dtype) for n, t in read_meta(folder).items()}
    asked: dict[str, object] = {}
    for name, shape in base_shapes(settings).items():
        kind = "fp8" if names.FP8_LINEAR.search(name) else "plain"
        kind = "int4" if names.EXPERT.match(name) else kind
        asked |= {n: (t.shape, t.dtype) for n, t in stored_as(name, shape, kind, 128).items()}
    assert asked == base
    folder = tiny_model / "upstream"
    head = read_meta(folder)
    shapes = head_shapes(settings)
    assert {n: tuple(t.shape) for n, t in decode_head(head).items()} == shapes
    scaled = {name.replace(".scale", ".weight") for name in head if name.endswith(".scale")}
    patterns = (names.EXPERT, names.FP8_LINEAR, names.FP8_UPSTREAM_ONLY)
    classes = [{name for name in shapes if pattern.search(name)} for pattern in patterns]
    assert scaled == set.union(*classes) and len(scaled) == sum(map(len, classes))
    assert classes[1] == {f"mtp.0.{linear}.weight" for linear in ATTENTION}
    for name in shapes.keys() - scaled:
        assert head[name].dtype == names.storage_dtype(name), name


def test_upstream_without_a_head_or_with_three_blocks_is_refused() -> None:
    with pytest.raises(GraftError, match=r"has no mtp\.\* tensors"):
        names.upstream_head_names(["layers.0.attn.wq_a.weight"], "upstream")
    with pytest.raises(GraftError, match="DSpark"):
        names.upstream_head_names([f"mtp.{i}.norm.weight" for i in range(3)], "upstream")
