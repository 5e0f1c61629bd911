"""Defects to plant into a good checkpoint, by the id that doctor has for each.

A defect works on a copy whose files are its own. `benchmarks/` and the docs say what vLLM does
with some of them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
HEAD = "model-mtp-w4a16.safetensors"
Plant = Callable[[Path], None]


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_quantization(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_config(folder, lambda config: change(config["quantization_config"]))


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_shard(
    folder: Path, change: Callable[[dict[str, Tensor]], object], shard: str = HEAD
) -> None:
    """Change a shard's tensors; the index follows."""
    tensors = load_file(folder / shard)
    before = set(tensors)
    change(tensors)
    (folder / shard).unlink()
    save_file(tensors, folder / shard, metadata={"format": "pt"})

    def follow(weight_map: dict[str, str]) -> None:
        for name in before - tensors.keys():
            del weight_map[name]
        weight_map.update(dict.fromkeys(tensors, shard))

    edit_index(folder, follow)


def rename(pattern: str, replacement: str) -> Plant:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            renamed = re.sub(pattern, replacement, name)
            if renamed != name:
                tensors[renamed] = tensors.pop(name)

    return lambda folder: edit_shard(folder, change)


def rename_experts(folder: Path) -> None:
    for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        rename(rf"(\.experts\.\d+\.){old}\.", rf"\1{new}.")(folder)


def truncate(folder: Path) -> None:
    data = (folder / HEAD).read_bytes()
    (folder / HEAD).unlink()
    (folder / HEAD).write_bytes(data[: len(data) // 2])


def list_what_is_not_there(folder: Path) -> None:
    edit_shard(folder, lambda tensors: tensors.pop("mtp.0.ffn.experts.5.w2.weight_scale"))
    edit_index(folder, lambda m: m.update({"mtp.0.ffn.experts.5.w2.weight_scale": HEAD}))


def forget(pattern: str) -> Plant:
    """Return what removes names from the index."""

    def drop(weight_map: dict[str, str]) -> None:
        for name in [name for name in weight_map if re.match(pattern, name)]:
            del weight_map[name]

    return lambda folder: edit_index(folder, drop)


def hold_a_tensor_twice(folder: Path) -> None:
    save_file({"mtp.0.enorm.weight": torch.ones(256).bfloat16()}, folder / "extra.safetensors")
    edit_index(folder, lambda m: m.update({"mtp.0.enorm.weight": "extra.safetensors"}))


def change(edit: Callable[[dict[str, Tensor]], object], shard_with: str | None = None) -> Plant:
    """Return what edits the head's tensors, or those of the shard that holds a tensor."""

    def plant(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_shard(folder, edit, weight_map[shard_with] if shard_with else HEAD)

    return plant


def drop(name: str, place: str | None = None) -> Plant:
    return change(lambda tensors: tensors.pop(name), place)


def add(name: str, place: str | None = None) -> Plant:
    return change(lambda tensors: tensors.update({name: torch.zeros(4).bfloat16()}), place)


def replace(name: str, make: Callable[[Tensor], Tensor]) -> Plant:
    return change(lambda tensors: tensors.update({name: make(tensors[name]).contiguous()}))


def round_float32(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if "hc_" in name or name.endswith(("attn_sink", "gate.bias")):
            tensors[name] = tensor.bfloat16()


def store_a_compressor_in(dtype: torch.dtype) -> Plant:
    stem = "layers.2.attn.compressor.wkv"

    def edit(tensors: dict[str, Tensor]) -> None:
        weight = tensors[f"{stem}.weight"]
        tensors[f"{stem}.weight"] = weight.to(dtype)
        blocks = (-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
        tensors[f"{stem}.weight_scale"] = torch.ones(blocks, dtype=torch.bfloat16)

    return change(edit, f"{stem}.weight")


def add_dspark_blocks(tensors: dict[str, Tensor]) -> None:
    for block in (1, 2):
        tensors[f"mtp.{block}.enorm.weight"] = tensors["mtp.0.enorm.weight"].clone()


def section(edit: Callable[[dict[str, Any]], object]) -> Plant:
    return lambda folder: edit_quantization(folder, edit)


def ignore(pattern: str) -> Plant:
    return section(lambda q: q["ignore"].append(pattern))


def retarget(group: str, targets: list[str]) -> Plant:
    return section(lambda q: q["config_groups"][group].update(targets=targets))


def shrink_groups(quantization: dict[str, Any]) -> None:
    quantization["config_groups"]["group_1"]["weights"]["group_size"] = 64


def set_config(key: str, value: object) -> Plant:
    return lambda folder: edit_config(folder, lambda config: config.update({key: value}))


def drop_config(key: str) -> Plant:
    return lambda folder: edit_config(folder, lambda config: config.pop(key))


NORM = "layers.1.ffn_norm.weight"
EXPERT = "mtp.0.ffn.experts.3"
NATIVE_EXPERTS = r"re:.*\.ffn\.experts\.\d+\.(w1|w2|w3)$"

#: name -> (id that doctor reports, what plants it)
DEFECTS: dict[str, tuple[str, Plant]] = {
    "truncated-shard": ("shard-unreadable", truncate),
    "missing-shard": ("shard-missing", lambda folder: (folder / HEAD).unlink()),
    "entry-without-tensor": ("index-entry-without-tensor", list_what_is_not_there),
    "shard-not-in-index": ("tensor-without-index-entry", forget(r"mtp\.")),
    "tensor-not-in-index": ("tensor-without-index-entry", forget(r"mtp\.0\.e_proj\.weight")),
    "tensor-in-two-shards": ("tensor-twice", hold_a_tensor_twice),
    "missing-parameter": ("head-tensor-missing", drop("mtp.0.hnorm.weight")),
    "missing-scale": ("head-tensor-missing", drop(f"{EXPERT}.w1.weight_scale")),
    "unknown-tensor": ("head-tensor-unknown", add("mtp.0.ffn.experts.3.w4.weight")),
    "base-without-a-norm": ("base-tensor-missing", drop(NORM, NORM)),
    "base-with-zero-points": ("base-tensor-unknown", add(f"{NORM}_zero_point", NORM)),
    "gate-up-down-names": ("tensor-name", rename_experts),
    "head-named-as-layer": ("tensor-name", rename(r"^mtp\.0\.", "layers.4.")),
    "scale-inv": ("scale-name", rename(r"\.weight_scale$", ".weight_scale_inv")),
    "scale-of-linears": ("scale-name", rename(r"(_proj|attn\.w\w+)\.weight_scale$", r"\1.scale")),
    "wrong-shape": ("tensor-shape", replace("mtp.0.attn.q_norm.weight", lambda t: t[:64])),
    "wrong-group": (
        "scale-shape",
        replace(f"{EXPERT}.w2.weight_scale", lambda t: t.repeat_interleave(2, dim=1)),
    ),
    "wrong-group-size-in-config": ("group-size", section(shrink_groups)),
    "wrong-dtype": ("tensor-dtype", replace("mtp.0.e_proj.weight", lambda t: t.view(torch.int8))),
    "rounded-float32": ("float32-rounded", change(round_float32)),
    "fp8-compressor": ("compressor-fp8", store_a_compressor_in(torch.float8_e4m3fn)),
    "scaled-bf16-compressor": ("compressor-quantized", store_a_compressor_in(torch.bfloat16)),
    "dspark": ("dspark-drafter", change(add_dspark_blocks)),
    "no-head-count": ("nextn-count", drop_config("num_nextn_predict_layers")),
    "head-count-0": ("nextn-count", set_config("num_nextn_predict_layers", 0)),
    "head-compressed": ("compress-ratios", set_config("compress_ratios", [0, 0, 4, 128, 4])),
    "no-ratio-for-head": ("compress-ratios", set_config("compress_ratios", [0, 0, 4, 128])),
    "too-few-ratios": ("compress-ratios", set_config("compress_ratios", [0, 0, 4])),
    "no-ratios": ("compress-ratios", drop_config("compress_ratios")),
    "no-quantization-config": ("quantization-config", drop_config("quantization_config")),
    "target-for-mtp": (
        "pattern-names-mtp",
        retarget("mtp_projections", [r"re:^mtp\.0\.(e_proj|h_proj)$"]),
    ),
    "ignore-for-mtp": ("pattern-names-mtp", ignore("mtp.0.ffn.shared_experts.w1")),
    "unanchored-ignore": ("pattern-too-wide", ignore("re:.*e_proj")),
    "ignore-takes-the-head": ("pattern-too-wide", ignore(r"re:.*layers\.4\.attn\..*")),
    "ignore-is-null": ("ignore-null", section(lambda q: q.update(ignore=None))),
    "one-family-of-names": ("expert-target-names", retarget("group_1", [NATIVE_EXPERTS])),
    "projections-without-group": (
        "scheme-mismatch",
        section(lambda q: q["config_groups"].pop("mtp_projections")),
    ),
}
