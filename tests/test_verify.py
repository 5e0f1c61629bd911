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
from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.errors import GraftError
from mtp_graft.recipe import ALL_VARIANTS as VARIANTS
from mtp_graft.recipe import Linears, Variant
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import verify

EXPERT = "mtp.0.ffn.experts.9"
W1_CODES, W1_SCALE = f"{EXPERT}.w1.weight_packed", f"{EXPERT}.w1.weight_scale"
H_SCALE, SHARED = "mtp.0.h_proj.weight_scale", "mtp.0.ffn.shared_experts.w2.weight"
Head = dict[str, Tensor]
Damage = Callable[[Head], object]


@pytest.fixture
def upstream(tiny_model: Path) -> Path:
    return tiny_model / "upstream"


@pytest.fixture
def damaged(spliced: dict[str, Path], tmp_path: Path) -> Callable[[Variant], Path]:
    """A copy of a variant's checkpoint whose files can be replaced."""

    def copy(variant: Variant) -> Path:
        return shutil.copytree(spliced[variant], tmp_path / variant, copy_function=os.link)

    return copy


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.unlink()  # a link to the original
    path.write_text(json.dumps(content))


def change_head(checkpoint: Path, change: Damage) -> None:
    """Change the head's shard, and list what it then holds."""
    head = load_file(checkpoint / HEAD_SHARD)
    change(head)
    (checkpoint / HEAD_SHARD).unlink()
    save_file({name: t.contiguous() for name, t in head.items()}, checkpoint / HEAD_SHARD)

    def relist(index: dict[str, Any]) -> None:
        kept = {n: s for n, s in index["weight_map"].items() if s != HEAD_SHARD}
        index["weight_map"] = {**kept, **dict.fromkeys(head, HEAD_SHARD)}

    change_json(checkpoint / INDEX_NAME, relist)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sound_checkpoint_is_found_so(
    spliced: dict[str, Path], tiny_base: Path, upstream: Path, quantized: Path, variant: Variant
) -> None:
    result = verify(spliced[variant], tiny_base, upstream, quantized)
    assert result["ok"] and result["tensors"] == len(load_file(spliced[variant] / HEAD_SHARD))
    assert [result[key] for key in ("missing", "unexpected", "mismatched")] == [[], [], []]
    assert result["base_files_linked"] and result["base_unchanged"]
    assert result["loaded_in_vllm"] is None and result["variant"] == variant
    low, high = (0, 0) if variant in ("mxfp4", "bf16") else (0.05, 0.2)
    assert low <= result["rel_error_max"] <= high


@pytest.mark.parametrize(("linears", "fp8"), [("fp8", 10), ("base", 7), ("bf16", 5)])
def test_every_choice_of_linears_is_sound_and_keeps_as_many_in_fp8(
    spliced: dict[str, Path], tiny_base: Path, upstream: Path, tmp_path: Path,
    linears: Linears, fp8: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    splice(tiny_base, upstream, out, "mxfp4", linears=linears)
    assert verify(out, tiny_base, upstream)["ok"]
    head = load_file(out / HEAD_SHARD)
    assert sum(t.dtype == torch.float8_e4m3fn for t in head.values()) == fp8
    if linears == "bf16":  # with a config that takes its decoded linears for FP8
        shutil.copy(spliced["mxfp4"] / "config.json", out)
        assert "mtp.0.e_proj.weight_scale" in verify(out, tiny_base, upstream)["missing"]


# Sabotage: (variant, what is done to the head, what is found, in which tensor)


def rename(old: str, new: str) -> Damage:
    def change(head: Head) -> None:
        for name in [name for name in head if f"{EXPERT}.{old}." in name]:
            head[name.replace(f".{old}.", f".{new}.")] = head.pop(name)

    return change


def swap(old: str, new: str) -> Damage:
    def change(head: Head) -> None:
        for name in [name for name in head if old in name]:
            other = name.replace(old, new)
            head[name], head[other] = head[other], head[name]

    return change


def put(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda head: head.update({name: change(head[name])})


def flip(name: str) -> Damage:
    """Return what changes the last bit of a tensor's first value."""

    def change(head: Head) -> None:
        head[name].flatten().view(torch.uint8)[0] ^= 1

    return change


def set_first(name: str, change: Callable[[Tensor], Any]) -> Damage:
    def set_it(head: Head) -> None:
        head[name][0, 0] = change(head[name][0, 0])

    return set_it


SABOTAGE: list[tuple[Variant, Damage, str, str]] = [
    *((v, rename("w1", "gate_proj"), "missing", W1_CODES) for v in VARIANTS[:3]),
    ("bf16", rename("w1", "gate_proj"), "unexpected", f"{EXPERT}.gate_proj.weight"),
    ("rtn", lambda head: head.pop("mtp.0.enorm.weight"), "missing", "mtp.0.enorm.weight"),
    (
        *("rtn", lambda head: head.update({"mtp.0.head.weight": torch.zeros(2)})),
        *("unexpected", "mtp.0.head.weight"),
    ),
    ("rtn", swap(f"{EXPERT}.w1.", f"{EXPERT}.w3."), "mismatched", W1_CODES),
    ("mxfp4", swap(f"{EXPERT}.w1.", f"{EXPERT}.w3."), "mismatched", W1_CODES),
    ("gptq", swap("experts.9.w2", "experts.10.w2"), "mismatched", f"{EXPERT}.w2.weight_packed"),
    ("gptq", flip(W1_CODES), "mismatched", W1_CODES),
    ("rtn", put(W1_SCALE, lambda t: 2 * t), "mismatched", W1_CODES),
    ("rtn", set_first(W1_SCALE, lambda scale: 2 * scale), "mismatched", W1_CODES),
    ("rtn", set_first(W1_SCALE, lambda _: torch.nan), "mismatched", W1_CODES),
    ("rtn", put(f"{EXPERT}.w1.weight_shape", lambda t: t + 1), "mismatched", W1_CODES),
    ("mxfp4", set_first(W1_SCALE, lambda exponent: exponent + 1), "mismatched", W1_CODES),
    ("bf16", flip(f"{EXPERT}.w3.weight"), "mismatched", f"{EXPERT}.w3.weight"),
    ("rtn", put(H_SCALE, lambda t: 2 * t), "mismatched", "mtp.0.h_proj.weight"),
    ("rtn", put(H_SCALE, lambda t: 1 / t.float()), "mismatched", "mtp.0.h_proj.weight"),
    ("rtn", flip("mtp.0.attn.wo_a.weight"), "mismatched", "mtp.0.attn.wo_a.weight"),
    ("rtn", put(SHARED, lambda t: t.T), "mismatched", SHARED),
    ("rtn", put("mtp.0.hc_attn_fn", Tensor.bfloat16), "mismatched", "mtp.0.hc_attn_fn"),
    ("mxfp4", flip("mtp.0.ffn.gate.bias"), "mismatched", "mtp.0.ffn.gate.bias"),
]


@pytest.mark.parametrize(("variant", "damage", "kind", "tensor"), SABOTAGE)
def test_sabotage_is_found_and_named(
    damaged: Callable[[Variant], Path], tiny_base: Path, upstream: Path, quantized: Path,
    variant: Variant, damage: Damage, kind: str, tensor: str,
) -> None:  # fmt: skip
    checkpoint = damaged(variant)
    change_head(checkpoint, damage)
    result = verify(checkpoint, tiny_base, upstream, quantized)
    assert not result["ok"] and result["base_unchanged"]
    found = result[kind]
    assert tensor in ([each["tensor"] for each in found] if kind == "mismatched" else found)


def test_a_wrong_gptq_expert_is_found_without_the_quantize_stages_files(
    damaged: Callable[[Variant], Path], tiny_base: Path, upstream: Path
) -> None:
    checkpoint = damaged("gptq")
    change_head(checkpoint, put(W1_SCALE, lambda t: 2 * t))
    assert verify(checkpoint, tiny_base, upstream)["mismatched"]


# Index, config and base


@pytest.mark.parametrize("name", [W1_SCALE, "layers.0.attn_norm.weight"])
def test_an_index_that_is_not_what_the_shards_hold_is_found(
    damaged: Callable[[Variant], Path], tiny_base: Path, upstream: Path, name: str
) -> None:
    checkpoint = damaged("rtn")

    def change(index: dict[str, Any]) -> None:
        del index["weight_map"][name]
        index["weight_map"]["layers.0.stranger"] = HEAD_SHARD

    change_json(checkpoint / INDEX_NAME, change)
    result = verify(checkpoint, tiny_base, upstream)
    assert not result["ok"]
    assert result["missing"] == sorted([name, "layers.0.stranger"])
    assert result["unexpected"] == [name]


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_base_files_that_changed_or_did_not_come_along_are_found(
    tiny_base: Path, upstream: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_base, base, copy_function=os.link)
    (base / "inference").mkdir()
    (base / "inference" / "note.txt").write_text("one")
    splice(base, upstream, out, "mxfp4", copy=True)
    assert verify(out, base, upstream)["ok"]
    changed = ("model-00001-of-00003.safetensors", "inference/note.txt")
    for name in changed:
        flip_last_byte(out / name)
    (out / "tokenizer.json").unlink()
    result = verify(out, base, upstream)
    assert not (result["ok"] or result["base_unchanged"] or result["base_files_linked"])
    assert [result["base_files"][name] for name in changed] == ["differs", "differs"]
    assert result["base_files"]["tokenizer.json"] == "missing"
    assert result["base_files"]["model-00002-of-00003.safetensors"] == "same bytes"


def test_a_base_other_than_the_one_that_was_spliced_is_found(
    spliced: dict[str, Path], tiny_base: Path, upstream: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "base", copy_function=os.link)
    change_json(other / "config.json", lambda config: config.update({"rope_theta": 1}))
    assert not verify(spliced["mxfp4"], other, upstream)["base_unchanged"]


def test_a_checkpoint_without_a_manifest_is_one_error(
    damaged: Callable[[Variant], Path], tiny_base: Path, upstream: Path
) -> None:
    checkpoint = damaged("rtn")
    (checkpoint / MANIFEST_NAME).unlink()
    with pytest.raises(GraftError, match=r"MTP_QUANT_MANIFEST\.json: not found"):
        verify(checkpoint, tiny_base, upstream)
