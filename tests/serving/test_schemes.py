"""Bases with other experts than symmetric INT4: what vLLM serves passes, all else is named."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_graft.checkpoint.shards import read_weight_map
from mtp_graft.dsv4.config import check_dimensions, compress_ratios
from mtp_graft.dsv4.names import base_shapes, head_shapes
from mtp_graft.errors import GraftError
from mtp_graft.serving.doctor import diagnose
from mtp_graft.serving.doctor.hardware import find_target
from mtp_graft.stages.splice import splice
from serving.doctor_defects import INDEX, Tensors, edit_shard, section
from serving.flash import CONFIG

GPU, CPU = find_target(gpu="H200"), find_target(gpu="cpu")


def with_zero_points(tensors: Tensors) -> Tensors:
    packed = {n.removesuffix("packed"): t for n, t in tensors.items() if n.endswith("_packed")}
    points = {n: torch.zeros(t.shape[0] // 8, t.shape[1] // 16).int() for n, t in packed.items()}
    return tensors | {f"{name}zero_point": tensor for name, tensor in points.items()}


def in_8_bits(tensors: Tensors) -> Tensors:
    return {n: t.repeat(1, 2) if n.endswith("_packed") else t for n, t in tensors.items()}


def by_channel(tensors: Tensors) -> Tensors:
    is_scale = {n: f"{n.removesuffix('scale')}packed" in tensors for n in tensors}
    return {n: t[:, :1] if is_scale[n] else t for n, t in tensors.items()}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "base", copy_function=os.link)


@pytest.mark.parametrize(
    ("change", "weights", "on_gpu", "on_cpu"),
    [
        (with_zero_points, {"symmetric": False}, set(), {"quantization-config"}),
        (with_zero_points, {}, {"scheme-mismatch"}, {"scheme-mismatch"}),
        (None, {"symmetric": False}, {"scheme-mismatch"}, None),
        (in_8_bits, {"num_bits": 8}, set(), {"quantization-config"}),
        (by_channel, {"strategy": "channel", "group_size": -1}, set(), {"quantization-config"}),
        (by_channel, {"strategy": None, "group_size": -1}, set(), {"quantization-config"}),
        (None, {"strategy": "channel", "group_size": None}, {"scale-shape"}, None),
        (None, {"num_bits": 8}, {"scheme-mismatch"}, None),
        (None, {"num_bits": 3}, {"scheme-mismatch"}, None),
        (None, {"actorder": "group"}, {"quantization-config"}, None),
        (None, {"actorder": "static"}, set(), set()),
    ],
)
def test_what_vllm_serves_passes_and_the_head_is_of_the_bases_kind_or_its_own(
    base: Path, tiny_model: Path, change: Any, weights: Any, on_gpu: Any, on_cpu: Any
) -> None:
    index = read_weight_map(base / INDEX)
    for name in {shard: name for name, shard in index.items()}.values() if change else ():
        edit_shard(base, change, name)
    section(lambda q: q["config_groups"]["group_1"]["weights"].update(weights))(base)
    for target, expected in ((GPU, on_gpu), (CPU, on_cpu)):
        found = {f.id for f in diagnose(base, target) if f.severity == "error"}
        assert expected is None or found == expected
    if weights.get("actorder") == "static" or not weights:
        return
    with pytest.raises(GraftError, match=r"expected one group size of int4|actorder|a channel"):
        splice(base, tiny_model / "upstream", base.parent / "rtn", "rtn")
    if not on_gpu:
        splice(base, tiny_model / "upstream", base.parent / "mxfp4", "mxfp4")
        assert not [f.id for f in diagnose(base.parent / "mxfp4", GPU) if f.severity == "error"]


@pytest.mark.parametrize("pattern", ["re:(.|.)*[A-Z]$", "re:(.*?)*$x", "re:(.*){1,30}[A-Z]"])
def test_patterns_that_take_for_ever_are_a_finding_and_an_error(
    base: Path, tiny_model: Path, pattern: str
) -> None:
    section(lambda q: q["ignore"].append(pattern))(base)
    start = time.process_time()
    (found,) = (f for f in diagnose(base, GPU) if f.severity == "error")
    assert "takes more than" in found.found and time.process_time() - start < 10
    with pytest.raises(GraftError, match="takes more than"):
        splice(base, tiny_model / "upstream", base.parent / "rtn", "rtn")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architectures", ["LlamaForCausalLM"]),
        ("architectures", "DeepseekV4ForCausalLM"),
        ("rms_norm_eps", float("nan")),
        ("hc_eps", float("inf")),
        ("hc_eps", "1e-6"),
        ("rope_scaling", ["yarn"]),
        ("rope_scaling", {"factor": "16"}),
        ("rope_theta", -1),
        ("hidden_size", 10**9),
        ("num_hidden_layers", 4096),
        ("vocab_size", "9" * 10**6),
    ],
)
def test_values_that_no_model_has_are_one_short_error(name: str, value: Any) -> None:
    with pytest.raises(GraftError, match=rf"config\.json: {name}.* is .*; expected") as error:
        check_dimensions(CONFIG | {name: value})
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_the_largest_dimensions_that_pass_have_shapes_that_torch_can_hold() -> None:
    bounds = {"head_dim", "hidden_size", "vocab_size", "o_lora_rank", "q_lora_rank"}
    bounds |= {"num_attention_heads", "moe_intermediate_size", "index_head_dim", "index_n_heads"}
    config = CONFIG | dict.fromkeys(bounds, 2**20) | {"num_hidden_layers": 1}
    config |= {"compress_ratios": [2**16], "o_groups": 1, "n_routed_experts": 1, "hc_mult": 512}
    for name, shape in (base_shapes(config) | head_shapes(config)).items():
        assert torch.empty(shape, device="meta").nbytes > 0, name
    assert compress_ratios({"compress_ratios": [10**9]}) is None
