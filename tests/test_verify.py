"""Verify accounts for every tensor, and finds each way in which a head can be wrong."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD
from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.recipe import ALL_VARIANTS as VARIANTS
from mtp_graft.recipe import Variant
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import verify
from quantized import UPSTREAM, edit_json

EXPERT = "mtp.0.ffn.experts.9"
W1_CODES, W1_SCALE = f"{EXPERT}.w1.weight_packed", f"{EXPERT}.w1.weight_scale"
H_SCALE, SHARED = "mtp.0.h_proj.weight_scale", "mtp.0.ffn.shared_experts.w2.weight"
Head = dict[str, Tensor]
Damage = Callable[[Head], object]
Sabotage = Callable[[Variant, Damage], Path]


@pytest.fixture
def sabotaged(spliced: dict[str, Path], tmp_path: Path) -> Sabotage:
    """Return what copies a variant's checkpoint with a changed head, listed as it then is."""

    def copy(variant: Variant, damage: Damage) -> Path:
        checkpoint = shutil.copytree(spliced[variant], tmp_path / variant, copy_function=os.link)
        head = load_file(checkpoint / HEAD_SHARD)
        damage(head)
        (checkpoint / HEAD_SHARD).unlink()
        save_file({name: t.contiguous() for name, t in head.items()}, checkpoint / HEAD_SHARD)

        def relist(index: dict[str, Any]) -> None:
            kept = {n: s for n, s in index["weight_map"].items() if s != HEAD_SHARD}
            index["weight_map"] = {**kept, **dict.fromkeys(head, HEAD_SHARD)}

        edit_json(checkpoint / INDEX_NAME, relist)
        return checkpoint

    return copy


@pytest.mark.parametrize("variant", VARIANTS)
def test_sound_is_found_sound(spliced: Any, tiny_base: Path, quantized: Path, variant: Any) -> None:
    result = verify(spliced[variant], tiny_base, UPSTREAM, quantized)
    assert result["ok"] and result["tensors"] == len(load_file(spliced[variant] / HEAD_SHARD))
    assert [result[key] for key in ("missing", "unexpected", "mismatched")] == [[], [], []]
    assert result["base_files_linked"] and result["base_unchanged"]
    assert result["loaded_in_vllm"] is None and result["variant"] == variant
    low, high = (0, 0) if variant in ("mxfp4", "bf16") else (0.05, 0.2)
    assert low <= result["rel_error_max"] <= high


@pytest.mark.parametrize(("dtype", "fp8"), [("fp8", 10), ("base", 7), ("bf16", 5)])
def test_any_dtype_of_linears_is_sound(spliced: Any, tiny_base: Path, dtype: Any, fp8: int) -> None:
    out = Path("out")
    splice(tiny_base, UPSTREAM, out, "mxfp4", linear_dtype=dtype)
    assert verify(out, tiny_base, UPSTREAM)["ok"]
    head = load_file(out / HEAD_SHARD)
    assert sum(t.dtype == torch.float8_e4m3fn for t in head.values()) == fp8
    if dtype == "bf16":  # with a config that takes its decoded linears for FP8
        shutil.copy(spliced["mxfp4"] / "config.json", out)
        assert "mtp.0.e_proj.weight_scale" in verify(out, tiny_base, UPSTREAM)["missing"]


def rename_w1(head: Head) -> None:
    for name in [name for name in head if f"{EXPERT}.w1." in name]:
        head[name.replace(".w1.", ".gate_proj.")] = head.pop(name)


def swap_w1_and_w3(head: Head) -> None:
    for name in [name for name in head if f"{EXPERT}.w1." in name]:
        other = name.replace(".w1.", ".w3.")
        head[name], head[other] = head[other], head[name]


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


STRANGER = {"mtp.0.head.weight": torch.zeros(2)}
#: Variant, what is done to its head, what is found, in which tensor.
SABOTAGE: list[tuple[Variant, Damage, str, str]] = [
    ("gptq", rename_w1, "missing", W1_CODES),
    ("bf16", rename_w1, "unexpected", f"{EXPERT}.gate_proj.weight"),
    ("rtn", lambda head: head.pop("mtp.0.enorm.weight"), "missing", "mtp.0.enorm.weight"),
    ("rtn", lambda head: head.update(STRANGER), "unexpected", "mtp.0.head.weight"),
    ("rtn", swap_w1_and_w3, "mismatched", W1_CODES),
    ("mxfp4", swap_w1_and_w3, "mismatched", W1_CODES),
    ("rtn", set_first(W1_SCALE, lambda scale: 2 * scale), "mismatched", W1_CODES),
    ("rtn", set_first(W1_SCALE, lambda _: torch.nan), "mismatched", W1_CODES),
    ("rtn", put(f"{EXPERT}.w1.weight_shape", lambda t: t + 1), "mismatched", W1_CODES),
    ("mxfp4", set_first(W1_SCALE, lambda exponent: exponent + 1), "mismatched", W1_CODES),
    ("mxfp4", flip(W1_CODES), "mismatched", W1_CODES),
    ("mxfp4", flip("mtp.0.h_proj.weight"), "mismatched", "mtp.0.h_proj.weight"),
    ("bf16", flip(f"{EXPERT}.w3.weight"), "mismatched", f"{EXPERT}.w3.weight"),
    ("rtn", put(H_SCALE, lambda t: 2 * t), "mismatched", "mtp.0.h_proj.weight"),
    ("rtn", put(SHARED, lambda t: t.T), "mismatched", SHARED),
    ("rtn", put("mtp.0.hc_attn_fn", Tensor.bfloat16), "mismatched", "mtp.0.hc_attn_fn"),
    ("mxfp4", flip("mtp.0.ffn.gate.bias"), "mismatched", "mtp.0.ffn.gate.bias"),
]


@pytest.mark.parametrize(("head", "damage", "kind", "name"), SABOTAGE)
def test_sabotage_is_found_and_named(
    sabotaged: Any, tiny_base: Path, quantized: Path, head: Any, damage: Any, kind: str, name: str
) -> None:
    result = verify(sabotaged(head, damage), tiny_base, UPSTREAM, quantized)
    assert not result["ok"] and result["base_unchanged"]
    found = result[kind]
    assert name in ([each["tensor"] for each in found] if kind == "mismatched" else found)


def test_a_wrong_expert_is_found_without_gptq_files(sabotaged: Sabotage, tiny_base: Path) -> None:
    checkpoint = sabotaged("gptq", put(W1_SCALE, lambda t: 2 * t))
    assert verify(checkpoint, tiny_base, UPSTREAM)["mismatched"]


@pytest.mark.parametrize("name", [W1_SCALE, "layers.0.attn_norm.weight"])
def test_a_wrong_index_is_found(sabotaged: Sabotage, tiny_base: Path, name: str) -> None:
    checkpoint = sabotaged("rtn", lambda _: None)
    stranger = {"layers.0.stranger": HEAD_SHARD}
    edit_json(checkpoint / INDEX_NAME, lambda index: index["weight_map"].pop(name))
    edit_json(checkpoint / INDEX_NAME, lambda index: index["weight_map"].update(stranger))
    result = verify(checkpoint, tiny_base, UPSTREAM)
    assert result["missing"] == sorted([name, *stranger]) and not result["ok"]
    assert result["unexpected"] == [name]


def test_other_files_and_bases_are_found(tiny_base: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (base / "inference").mkdir()
    (base / "inference" / "note.txt").write_text("one")
    splice(base, UPSTREAM, out, "mxfp4", copy=True)
    assert verify(out, base, UPSTREAM)["ok"]
    edit_json(base / "config.json", lambda config: config.update({"rope_theta": 1}))
    assert not verify(out, base, UPSTREAM)["base_unchanged"]
    shutil.copy(tiny_base / "config.json", base)
    shard = out / "model-00001-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (out / "inference" / "note.txt").write_text("two")
    (out / "tokenizer.json").unlink()
    result = verify(out, base, UPSTREAM)
    assert not (result["ok"] or result["base_unchanged"] or result["base_files_linked"])
    files = result["base_files"]
    assert files[shard.name] == files["inference/note.txt"] == "differs"
    assert files["tokenizer.json"] == "missing"
    assert files["model-00002-of-00003.safetensors"] == "same bytes"


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("num_nextn_predict_layers", lambda c: c.update(num_nextn_predict_layers=0)),
        ("vocab_size", lambda c: c.update(vocab_size=65)),
        ("rope_scaling", lambda c: c.pop("rope_scaling")),
        ("quantization_config", lambda c: c["quantization_config"]["ignore"].append("re:.*attn.*")),
    ],
)
def test_a_changed_config_is_found(sabotaged: Any, tiny_base: Path, key: str, change: Any) -> None:
    checkpoint = sabotaged("mxfp4", lambda _: None)
    edit_json(checkpoint / "config.json", change)
    found = verify(checkpoint, tiny_base, UPSTREAM)
    assert f"config.json: {key}" in [each["tensor"] for each in found["mismatched"]]
    assert found["base_unchanged"] and not found["ok"]
