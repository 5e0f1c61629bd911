"""Verify accounts for every tensor, and finds each way in which a head can be wrong."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD, MANIFEST_NAME
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.variants import VARIANTS, Linears, Variant
from mtp_graft.errors import GraftError
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import verify
from quantized import write_quantized

INDEX = "model.safetensors.index.json"
EXPERT = "mtp.0.ffn.experts.9"
Head = dict[str, Tensor]


@pytest.fixture(scope="module")
def upstream(tiny_model: Path) -> Path:
    return tiny_model / "upstream"


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(tiny_model / "base", tmp_path_factory.mktemp("verify") / "base")


@pytest.fixture(scope="module")
def quantized(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized(tmp_path_factory.mktemp("run") / "quantize", load_tensors(upstream))


@pytest.fixture(scope="module")
def spliced(base: Path, upstream: Path, quantized: Path) -> dict[str, Path]:
    for variant in VARIANTS:
        given = quantized if variant == "gptq" else None
        splice(base, upstream, base.with_name(variant), variant, quantized=given)
    return {variant: base.with_name(variant) for variant in VARIANTS}


@pytest.mark.parametrize(("linears", "fp8"), [("fp8", 10), ("base", 7), ("bf16", 5)])
def test_every_choice_of_linears_is_sound_and_keeps_as_many_in_fp8(
    base: Path, upstream: Path, tmp_path: Path, linears: Linears, fp8: int
) -> None:
    splice(base, upstream, tmp_path / "out", "mxfp4", linears=linears)
    result = verify(tmp_path / "out", base, upstream)
    assert result["ok"], result
    head = load_file(tmp_path / "out" / HEAD_SHARD)
    kept = [name for name, t in head.items() if t.dtype == torch.float8_e4m3fn]
    assert len(kept) == fp8


def test_a_config_that_takes_a_decoded_linear_for_fp8_is_found(
    base: Path, upstream: Path, tmp_path: Path
) -> None:
    splice(base, upstream, tmp_path / "fp8", "mxfp4", linears="fp8")
    splice(base, upstream, tmp_path / "bf16", "mxfp4", linears="bf16")
    (tmp_path / "bf16" / "config.json").unlink()
    shutil.copy(tmp_path / "fp8" / "config.json", tmp_path / "bf16")
    result = verify(tmp_path / "bf16", base, upstream)
    assert not result["ok"]
    assert "mtp.0.e_proj.weight_scale" in result["missing"]


@pytest.fixture
def damaged(spliced: dict[str, Path], tmp_path: Path) -> Callable[[Variant], Path]:
    """A copy of a variant's checkpoint whose files can be replaced."""

    def copy(variant: Variant) -> Path:
        target = tmp_path / variant
        return shutil.copytree(spliced[variant], target, copy_function=os.link)

    return copy


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.unlink()  # a link to the original
    path.write_text(json.dumps(content))


def change_head(checkpoint: Path, change: Callable[[Head], object]) -> None:
    """Change the head's shard, and list what it then holds."""
    head = load_file(checkpoint / HEAD_SHARD)
    change(head)
    (checkpoint / HEAD_SHARD).unlink()
    save_file({name: t.contiguous() for name, t in head.items()}, checkpoint / HEAD_SHARD)

    def relist(index: dict[str, Any]) -> None:
        kept = {n: s for n, s in index["weight_map"].items() if s != HEAD_SHARD}
        index["weight_map"] = {**kept, **dict.fromkeys(head, HEAD_SHARD)}

    change_json(checkpoint / INDEX, relist)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sound_checkpoint_is_found_so(
    spliced: dict[str, Path], base: Path, upstream: Path, quantized: Path, variant: Variant
) -> None:
    result = verify(spliced[variant], base, upstream, quantized)
    head = [n for n in load_tensors(spliced[variant]) if n.startswith("mtp.0.")]
    assert result["ok"] and result["tensors"] == len(head)
    assert [result[key] for key in ("missing", "unexpected", "mismatched")] == [[], [], []]
    assert result["base_files_linked"] and result["base_unchanged"]
    assert result["loaded_in_vllm"] is None and result["variant"] == variant
    if variant in ("mxfp4", "bf16"):
        assert result["rel_error_max"] == 0
    else:
        assert 0.05 < result["rel_error_max"] < 0.2


# Sabotage: (variant, what is done to the head, what is found, in which tensor)


def rename_expert(head: Head) -> None:
    for name in [name for name in head if name.startswith(f"{EXPERT}.w1.")]:
        head[name.replace(".w1.", ".gate_proj.")] = head.pop(name)


def swap_w1_w3(head: Head) -> None:
    for name in [name for name in head if name.startswith(f"{EXPERT}.w1.")]:
        other = name.replace(".w1.", ".w3.")
        head[name], head[other] = head[other], head[name]


def swap_experts(head: Head) -> None:
    for name in [name for name in head if name.startswith(f"{EXPERT}.w2.")]:
        other = name.replace("experts.9.", "experts.10.")
        head[name], head[other] = head[other], head[name]


def drop_norm(head: Head) -> None:
    del head["mtp.0.enorm.weight"]


def downcast(head: Head) -> None:
    head["mtp.0.hc_attn_fn"] = head["mtp.0.hc_attn_fn"].bfloat16()


def nudge_bias(head: Head) -> None:
    bias = head["mtp.0.ffn.gate.bias"]
    bias[0] = torch.nextafter(bias[0], torch.tensor(torch.inf))


def double_expert_scale(head: Head) -> None:
    head[f"{EXPERT}.w1.weight_scale"] *= 2


def double_one_group(head: Head) -> None:
    head[f"{EXPERT}.w1.weight_scale"][0, 0] *= 2


def raise_one_exponent(head: Head) -> None:
    head[f"{EXPERT}.w1.weight_scale"][0, 0] += 1


def double_fp8_scale(head: Head) -> None:
    head["mtp.0.h_proj.weight_scale"] *= 2


def flip_fp8_code(head: Head) -> None:
    head["mtp.0.attn.wo_a.weight"].view(torch.uint8)[3, 5] ^= 1


def reverse_scale(head: Head) -> None:
    head["mtp.0.h_proj.weight_scale"] = 1 / head["mtp.0.h_proj.weight_scale"].float()


def transpose_shared(head: Head) -> None:
    name = "mtp.0.ffn.shared_experts.w2.weight"
    head[name] = head[name].T


def nudge_bf16(head: Head) -> None:
    head[f"{EXPERT}.w3.weight"].view(torch.int16)[0, 0] ^= 1


def wrong_shape_note(head: Head) -> None:
    head[f"{EXPERT}.w1.weight_shape"] += 1


def spoil_with_nan(head: Head) -> None:
    head[f"{EXPERT}.w1.weight_scale"][0, 0] = torch.nan


def shift_one_code(head: Head) -> None:
    head[f"{EXPERT}.w1.weight_packed"][0, 0] ^= 1


def add_stranger(head: Head) -> None:
    head["mtp.0.head.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("variant", "damage", "kind", "tensor"),
    [
        *((v, rename_expert, "missing", f"{EXPERT}.w1.weight_packed") for v in VARIANTS[:3]),
        ("bf16", rename_expert, "unexpected", f"{EXPERT}.gate_proj.weight"),
        ("rtn", swap_w1_w3, "mismatched", f"{EXPERT}.w1.weight_packed"),
        ("mxfp4", swap_w1_w3, "mismatched", f"{EXPERT}.w3.weight_packed"),
        ("gptq", swap_experts, "mismatched", f"{EXPERT}.w2.weight_packed"),
        ("rtn", drop_norm, "missing", "mtp.0.enorm.weight"),
        ("rtn", downcast, "mismatched", "mtp.0.hc_attn_fn"),
        ("mxfp4", nudge_bias, "mismatched", "mtp.0.ffn.gate.bias"),
        ("rtn", double_expert_scale, "mismatched", f"{EXPERT}.w1.weight_packed"),
        ("rtn", double_one_group, "mismatched", f"{EXPERT}.w1.weight_packed"),
        ("mxfp4", raise_one_exponent, "mismatched", f"{EXPERT}.w1.weight_packed"),
        ("rtn", double_fp8_scale, "mismatched", "mtp.0.h_proj.weight"),
        ("rtn", reverse_scale, "mismatched", "mtp.0.h_proj.weight"),
        ("rtn", flip_fp8_code, "mismatched", "mtp.0.attn.wo_a.weight"),
        ("rtn", transpose_shared, "mismatched", "mtp.0.ffn.shared_experts.w2.weight"),
        ("bf16", nudge_bf16, "mismatched", f"{EXPERT}.w3.weight"),
        ("rtn", wrong_shape_note, "mismatched", f"{EXPERT}.w1.weight_packed"),
        ("rtn", spoil_with_nan, "mismatched", f"{EXPERT}.w1.weight_packed"),
        ("gptq", shift_one_code, "mismatched", f"{EXPERT}.w1.weight_packed"),
        ("rtn", add_stranger, "unexpected", "mtp.0.head.weight"),
    ],
)
def test_sabotage_is_found_and_named(
    damaged: Callable[[Variant], Path],
    base: Path,
    upstream: Path,
    quantized: Path,
    variant: Variant,
    damage: Callable[[Head], None],
    kind: str,
    tensor: str,
) -> None:
    checkpoint = damaged(variant)
    change_head(checkpoint, damage)
    result = verify(checkpoint, base, upstream, quantized)
    assert not result["ok"]
    found = result[kind]
    assert tensor in ([each["tensor"] for each in found] if kind == "mismatched" else found)
    assert result["base_unchanged"]


@pytest.mark.parametrize("damage", [swap_w1_w3, double_expert_scale])
def test_a_wrong_gptq_expert_is_found_without_the_quantize_stages_files(
    damaged: Callable[[Variant], Path],
    base: Path,
    upstream: Path,
    damage: Callable[[Head], None],
) -> None:
    checkpoint = damaged("gptq")
    change_head(checkpoint, damage)
    assert verify(checkpoint, base, upstream)["mismatched"]


# Index, config and base


@pytest.mark.parametrize(
    "name", ["mtp.0.ffn.experts.9.w1.weight_scale", "layers.0.attn_norm.weight"]
)
def test_an_index_without_an_entry_is_found(
    damaged: Callable[[Variant], Path], base: Path, upstream: Path, name: str
) -> None:
    checkpoint = damaged("rtn")
    change_json(checkpoint / INDEX, lambda index: index["weight_map"].pop(name))
    result = verify(checkpoint, base, upstream)
    assert not result["ok"]
    assert result["missing"] == [name] and result["unexpected"] == [name]


def test_an_entry_whose_shard_lacks_the_tensor_is_found(
    damaged: Callable[[Variant], Path], base: Path, upstream: Path
) -> None:
    checkpoint = damaged("rtn")
    added = {"layers.0.stranger": HEAD_SHARD}
    change_json(checkpoint / INDEX, lambda index: index["weight_map"].update(added))
    assert verify(checkpoint, base, upstream)["missing"] == ["layers.0.stranger"]


def test_a_changed_base_file_is_found(
    damaged: Callable[[Variant], Path], base: Path, upstream: Path
) -> None:
    checkpoint = damaged("mxfp4")
    shard = checkpoint / "model-00001-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.unlink()
    shard.write_bytes(content)
    result = verify(checkpoint, base, upstream)
    assert not (result["ok"] or result["base_unchanged"] or result["base_files_linked"])
    assert result["base_files"][shard.name] == "differs"
    assert result["base_files"]["model-00002-of-00003.safetensors"] == "same inode"


def test_a_base_file_that_did_not_come_along_is_found(
    damaged: Callable[[Variant], Path], base: Path, upstream: Path
) -> None:
    checkpoint = damaged("mxfp4")
    (checkpoint / "tokenizer.json").unlink()
    result = verify(checkpoint, base, upstream)
    assert not result["ok"] and result["base_files"]["tokenizer.json"] == "missing"


def test_files_in_the_bases_folders_are_compared_too(
    tiny_model: Path, upstream: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model / "base", tmp_path / "base")
    (base / "inference").mkdir()
    (base / "inference" / "note.txt").write_text("one")
    splice(base, upstream, tmp_path / "out", "mxfp4", copy=True)
    assert verify(tmp_path / "out", base, upstream)["ok"]
    (tmp_path / "out" / "inference" / "note.txt").write_text("two")
    result = verify(tmp_path / "out", base, upstream)
    assert not result["ok"] and result["base_files"]["inference/note.txt"] == "differs"


def test_a_base_other_than_the_one_that_was_spliced_is_found(
    spliced: dict[str, Path], base: Path, upstream: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "base", copy_function=os.link)
    change_json(other / "config.json", lambda config: config.update({"rope_theta": 1}))
    assert not verify(spliced["mxfp4"], other, upstream)["base_unchanged"]


def test_a_checkpoint_without_a_manifest_is_one_error(
    damaged: Callable[[Variant], Path], base: Path, upstream: Path
) -> None:
    checkpoint = damaged("rtn")
    (checkpoint / MANIFEST_NAME).unlink()
    with pytest.raises(GraftError, match=r"MTP_QUANT_MANIFEST\.json: not found"):
        verify(checkpoint, base, upstream)
