"""Names against transformers' own table, the bundled checkpoints and the format's description."""

import json
import re
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

NUM_EXPERTS = 64
MATRICES = [f"ffn.experts.{e}.{w}" for e in range(NUM_EXPERTS) for w in ("w1", "w2", "w3")]
ATTENTION = [f"attn.{linear}" for linear in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")]
SHARED_EXPERT = [f"ffn.shared_experts.{w}" for w in ("w1", "w2", "w3")]
#: What upstream's head consists of: matrices with a scale, then everything else.
SCALED = [*MATRICES, *ATTENTION, *SHARED_EXPERT, "e_proj", "h_proj"]
BF16 = [
    "ffn.gate.weight",
    *(f"attn.{norm}_norm.weight" for norm in ("q", "kv")),
    *(f"{norm}.weight" for norm in ("attn_norm", "ffn_norm", "enorm", "hnorm", "norm")),
]
F32 = [
    "ffn.gate.bias",
    "attn.attn_sink",
    *(f"hc_{place}_{p}" for place in ("attn", "ffn", "head") for p in ("fn", "base", "scale")),
]
HEAD = {f"mtp.0.{name}" for name in [*(f"{module}.weight" for module in SCALED), *BF16, *F32]}


def index_names(folder: Path) -> set[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return set(index["weight_map"])


def weights_of(stored: set[str]) -> set[str]:
    """Name every quantized weight, stored in parts, by its plain `.weight`."""
    return {re.sub(r"\.(weight_(packed|scale|shape)|scale)$", ".weight", name) for name in stored}


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> DeepseekV4Config:
    return DeepseekV4Config(**json.loads((tiny_model / "make" / "config.json").read_text()))


@pytest.fixture(scope="module")
def base_state(config: DeepseekV4Config) -> dict[str, Tensor]:
    with torch.device("meta"):
        return DeepseekV4ForCausalLM(config).state_dict()


@pytest.fixture(scope="module")
def head_state(config: DeepseekV4Config) -> dict[str, Tensor]:
    with torch.device("meta"):
        return MTPHead(config).state_dict()


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


def test_renamed_modules_have_the_names_of_the_format(
    base_state: dict[str, Tensor], head_state: dict[str, Tensor], tiny_model: Path
) -> None:
    renamed = names.base_from_transformers(base_state)
    assert set(renamed) == weights_of(index_names(tiny_model / "base"))
    assert set(names.head_from_module(head_state)) == HEAD
    scales = {f"mtp.0.{module}.scale" for module in SCALED}
    assert index_names(tiny_model / "upstream") == HEAD | scales


def test_storage_dtypes_are_those_of_the_format() -> None:
    assert all(names.storage_dtype(f"mtp.0.{name}") == torch.float32 for name in F32)
    assert all(names.storage_dtype(f"mtp.0.{name}") == torch.bfloat16 for name in BF16)
    in_float32 = ["hc_head_fn", "layers.2.attn.compressor.ape", "layers.3.hc_ffn_scale"]
    assert all(names.storage_dtype(name) == torch.float32 for name in in_float32)
    in_bf16 = ["embed.weight", "head.weight", "norm.weight", "layers.2.attn.indexer.wq_b.weight"]
    assert all(names.storage_dtype(name) == torch.bfloat16 for name in in_bf16)
    assert names.storage_dtype("layers.0.ffn.gate.tid2eid") == torch.int32


def test_quantized_matrices_are_recognized_by_name(tiny_model: Path) -> None:
    """FP8 in base and head; FP8 upstream alone; routed experts: each name is in one class."""
    head = {name for name in HEAD if names.FP8_LINEAR.search(name)}
    assert head == {f"mtp.0.{linear}.weight" for linear in ATTENTION}
    upstream_only = {name for name in HEAD if names.FP8_UPSTREAM_ONLY.search(name)}
    assert upstream_only == {
        f"mtp.0.{linear}.weight" for linear in (*SHARED_EXPERT, "e_proj", "h_proj")
    }
    assert {name for name in HEAD if names.EXPERT.match(name)} == {
        f"mtp.0.{matrix}.weight" for matrix in MATRICES
    }
    base = {name for name in weights_of(index_names(tiny_model / "base"))}
    fp8 = {f"layers.{layer}.{linear}.weight" for layer in range(4) for linear in ATTENTION}
    fp8.add("layers.2.attn.indexer.wq_b.weight")
    assert {name for name in base if names.FP8_LINEAR.search(name)} == fp8
    assert len({name for name in base if names.EXPERT.match(name)}) == 4 * 3 * NUM_EXPERTS
