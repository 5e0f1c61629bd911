"""Scale names keep the checkpoint's spelling under the mappers of vLLM's own models."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the mappers are vLLM's: install the cpu extra")

from vllm.model_executor.models.utils import WeightsMapper
from vllm.models.deepseek_v4.cpu.model import (
    DeepseekV4ForCausalLM,
    _make_deepseek_v4_weights_mapper,
)

from mtp_graft.vllm_plugin.scale_names import keep_weight_scale

pytestmark = pytest.mark.vllm

SCALES = {
    "layers.2.attn.wq_a.weight_scale": "model.layers.2.attn.wq_a.weight_scale",
    "layers.2.attn.indexer.wq_b.weight_scale": "model.layers.2.attn.indexer.wq_b.weight_scale",
    "layers.2.ffn.experts.7.w1.weight_scale": "model.layers.2.ffn.experts.7.w1.weight_scale",
}


@pytest.fixture(params=["fp4", "int4", "fp8"])
def stock(request: pytest.FixtureRequest) -> WeightsMapper:
    return _make_deepseek_v4_weights_mapper(request.param)


def test_weight_scales_keep_their_names(stock: WeightsMapper) -> None:
    kept = keep_weight_scale(stock)
    assert {name: kept.map_name(name) for name in SCALES} == SCALES


def test_the_stock_mapper_renames_them_or_this_gap_is_closed() -> None:
    name = "layers.2.attn.wq_a.weight_scale"
    if DeepseekV4ForCausalLM.hf_to_vllm_mapper.map_name(name) == SCALES[name]:
        pytest.skip("vLLM's own mapper keeps weight_scale; scale_names.py is not needed any more")
    stock = DeepseekV4ForCausalLM.hf_to_vllm_mapper
    assert stock.map_name(name) == f"{SCALES[name]}_inv"


def test_every_other_name_is_mapped_as_before(stock: WeightsMapper, tiny_model: Path) -> None:
    index = json.loads((tiny_model / "base" / "model.safetensors.index.json").read_text())
    names = [name for name in index["weight_map"] if not name.endswith("scale")]
    names += ["mtp.0.e_proj.weight", "layers.0.attn.wq_a.input_scale"]
    kept = keep_weight_scale(stock)
    assert len(names) > 1000
    assert [kept.map_name(name) for name in names] == [stock.map_name(name) for name in names]


def test_only_rules_that_make_scale_inv_go_and_the_argument_stays_as_it_was() -> None:
    drop, other = re.compile(r"\.rotary\."), re.compile(r"\.a$")
    rename = re.compile(r"\.scale$")
    rules: dict[re.Pattern[str], Any] = {drop: None, rename: ".weight_scale_inv", other: ".b"}
    mapper = WeightsMapper(orig_to_new_regex=rules, orig_to_new_prefix={"x.": "y."})
    kept = keep_weight_scale(mapper)
    assert kept.orig_to_new_regex == {drop: None, other: ".b"}
    assert dataclasses.replace(kept, orig_to_new_regex=rules) == mapper
    assert rename in mapper.orig_to_new_regex
