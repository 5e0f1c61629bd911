"""Defects to plant into a good checkpoint, by the id that doctor has for each.

Files are replaced and never written to: a checkpoint may share them with another by links.
`benchmarks/` and the docs say what vLLM does with some of the defects.
"""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.shards import Shard, read_weight_map, save_shard
from mtp_graft.dsv4.names import base_shapes
from mtp_graft.dsv4.variants import stored_as
from mtp_graft.serving.command import read_config
from mtp_graft.serving.doctor import examine
from mtp_graft.serving.doctor.checkpoint import Checkpoint, read_checkpoint
from mtp_graft.serving.doctor.hardware import Target, find_target
from quantized import edit_json

INDEX = "model.safetensors.index.json"
HEAD = "model-mtp-w4a16.safetensors"
Tensors = dict[str, Tensor]
Json = dict[str, Any]
Plant = Callable[[Path], None]
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 7\n" % (b"0" * 64)


def edit_config(folder: Path, change: Callable[[Json], object]) -> None:
    edit_json(folder / "config.json", change)


def edit_index(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    write_json({"weight_map": change(read_weight_map(folder / INDEX))}, folder / INDEX)


def edit_shard(folder: Path, change: Callable[[Tensors], Tensors], holding: str = "") -> None:
    """Change the head's shard, or the one that holds a tensor; the index follows."""
    name = read_weight_map(folder / INDEX)[holding] if holding else HEAD
    with Shard(folder / name) as shard:
        tensors = change(shard.read(shard.meta))
    save_shard(tensors, folder / name)
    others = {n: s for n, s in read_weight_map(folder / INDEX).items() if s != name}
    edit_index(folder, lambda _listed: others | dict.fromkeys(tensors, name))


def change(edit: Callable[[Tensors], Tensors], holding: str = "") -> Plant:
    return lambda folder: edit_shard(folder, edit, holding)


def rename(pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> Plant:
    return change(lambda tensors: {re.sub(pattern, replacement, n): t for n, t in tensors.items()})


def drop(name: str, holding: str = "") -> Plant:
    return change(lambda tensors: {n: t for n, t in tensors.items() if n != name}, holding)


def add(name: str, holding: str = "") -> Plant:
    return change(lambda tensors: tensors | {name: torch.zeros(4).bfloat16()}, holding)


def replace(name: str, make: Callable[[Tensor], Tensor]) -> Plant:
    return change(lambda tensors: tensors | {name: make(tensors[name])})


def change_file(name: str, change: Callable[[bytes], bytes]) -> Plant:
    def plant(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(change(data))

    return plant


def leave_an_old_shard(folder: Path) -> None:
    old = folder / "model-00001-of-00002.safetensors"
    old.hardlink_to(folder / "model-00001-of-00003.safetensors")


def leave(name: str, data: bytes | None = None) -> Plant:
    """Return what adds a file that the index does not name: these bytes, or tensors of its own."""

    def plant(folder: Path) -> None:
        (folder / name).write_bytes(data or b"")
        if data is None:
            tensors = {"layers.0.attention.wq.weight": torch.zeros(2), NORM: torch.zeros(2)}
            save_shard(tensors, folder / name)

    return plant


def list_what_is_not_there(folder: Path) -> None:
    drop(W2_SCALE)(folder)
    edit_index(folder, lambda listed: listed | {W2_SCALE: HEAD})


def forget(pattern: str) -> Plant:
    return lambda folder: edit_index(
        folder, lambda listed: {n: s for n, s in listed.items() if not re.match(pattern, n)}
    )


def hold_a_tensor_twice(folder: Path) -> None:
    save_shard({"mtp.0.enorm.weight": torch.ones(256).bfloat16()}, folder / "extra.safetensors")
    edit_index(folder, lambda listed: listed | {"mtp.0.enorm.weight": "extra.safetensors"})


def round_float32(tensors: Tensors) -> Tensors:
    wide = ("hc_", "attn_sink", "gate.bias")
    return {n: t.bfloat16() if any(w in n for w in wide) else t for n, t in tensors.items()}


def store_a_compressor_in(dtype: torch.dtype) -> Plant:
    name = "layers.2.attn.compressor.wkv.weight"

    def edit(tensors: Tensors) -> Tensors:
        outputs, inputs = tensors[name].shape
        scale = torch.ones(-(-outputs // 128), -(-inputs // 128)).bfloat16()
        return tensors | {name: tensors[name].to(dtype), f"{name}_scale": scale}

    return change(edit, name)


def section(edit: Callable[[Json], object]) -> Plant:
    return lambda folder: edit_config(folder, lambda config: edit(config["quantization_config"]))


def ignore(pattern: str) -> Plant:
    return section(lambda q: q["ignore"].append(pattern))


def retarget(group: str, targets: list[str]) -> Plant:
    return section(lambda q: q["config_groups"][group].update(targets=targets))


def ignore_shared_experts_as_mtp(quantization: Json) -> None:
    quantization["ignore"][-1] = r"re:^mtp\.0\.ffn\.shared_experts\..*"
    target = r"re:.*layers\.4\.ffn\.shared_experts\..*"
    quantization["config_groups"]["mtp_projections"]["targets"].append(target)


def set_config(key: str, value: object) -> Plant:
    return lambda folder: edit_config(folder, lambda config: config.update({key: value}))


def drop_config(key: str) -> Plant:
    return lambda folder: edit_config(folder, lambda config: config.pop(key))


ON_GPU, ON_CPU = find_target(gpu="H200"), find_target(gpu="cpu")


def changed(base: Path, kinds: dict[str, str], edit: Callable[[Any], object]) -> Checkpoint:
    """Return a base with some modules, by pattern, stored as another kind; no values."""
    found, config = read_checkpoint(base), read_config(base)
    shapes = base_shapes(config)
    shards = {shard: dict(held) for shard, held in found.shards.items()}
    for name, (pattern, kind) in product(shapes, kinds.items()):
        if re.fullmatch(pattern, name.removesuffix(".weight")):
            held = next(h for h in shards.values() if any(n.startswith(name) for n in h))
            for part in ("", "_packed", "_scale", "_shape"):
                held.pop(f"{name}{part}", None)
            size = 64 if kind.endswith("/64") else 128
            held |= stored_as(name, shapes[name], kind.removesuffix("/64"), size)
    edit(config["quantization_config"])
    index = {name: shard for shard, held in shards.items() for name in held}
    return Checkpoint(base, config, index, shards, {})


def errors(checkpoint: Checkpoint, target: Target = ON_GPU) -> dict[str, str]:
    return {f.id: f.where for f in examine(checkpoint, target) if f.severity == "error"}


NORM = "layers.1.ffn_norm.weight"
EXPERT = "mtp.0.ffn.experts.3"
W2_SCALE = f"{EXPERT}.w2.weight_scale"
MTP_PROJECTIONS = r"re:^mtp\.0\.(e_proj|h_proj)$"
SIZE = re.compile(rb'"total_size": ?')
OTHER_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
NATIVE_EXPERTS = r"re:.*\.ffn\.experts\.\d+\.(w1|w2|w3)$"
#: name -> (id that doctor reports, what plants it)
DEFECTS: dict[str, tuple[str, Plant]] = {
    "truncated-shard": ("shard-unreadable", change_file(HEAD, lambda data: data[: len(data) // 2])),
    "shard-not-fetched": ("shard-unreadable", change_file(HEAD, lambda _data: LFS_POINTER)),
    "shard-of-another-release": ("shard-stale", leave_an_old_shard),
    "adapter": ("shard-stale", leave("adapter_model.safetensors")),
    "empty-shard": ("shard-stale", leave("model-9.safetensors", b"")),
    "pointer-to-an-old-shard": ("shard-stale", leave("model-9.safetensors", LFS_POINTER)),
    "consolidated-copy": ("shard-consolidated", leave("consolidated.safetensors")),
    "wrong-total-size": ("index-total-size", change_file(INDEX, lambda i: SIZE.sub(rb"\g<0>4", i))),
    "tokenizer-cut": ("file-unreadable", change_file("tokenizer.json", lambda data: data[:-9])),
    "tokenizer-of-nothing": ("file-unreadable", change_file("tokenizer.json", lambda _: b"{}")),
    "no-tokenizer": ("file-missing", lambda folder: (folder / "tokenizer.json").unlink()),
    "missing-shard": ("shard-missing", lambda folder: (folder / HEAD).unlink()),
    "entry-without-tensor": ("index-entry-without-tensor", list_what_is_not_there),
    "shard-not-in-index": ("tensor-without-index-entry", forget(r"mtp\.")),
    "tensor-not-in-index": ("tensor-without-index-entry", forget(r"mtp\.0\.e_proj\.weight")),
    "entry-for-another-shard": (
        "tensor-without-index-entry",
        lambda folder: edit_index(folder, lambda i: i | {"mtp.0.norm.weight": i["norm.weight"]}),
    ),
    "tensor-in-two-shards": ("tensor-twice", hold_a_tensor_twice),
    "missing-parameter": ("head-tensor-missing", drop("mtp.0.hnorm.weight")),
    "missing-scale": ("head-tensor-missing", drop(f"{EXPERT}.w1.weight_scale")),
    "unknown-tensor": ("head-tensor-unknown", add("mtp.0.ffn.experts.3.w4.weight")),
    "base-without-a-norm": ("base-tensor-missing", drop(NORM, NORM)),
    "base-with-zero-points": ("base-tensor-unknown", add(f"{NORM}_zero_point", NORM)),
    "gate-up-down-names": (
        "tensor-name",
        rename(r"(\.experts\.\d+\.)(w[123])", lambda match: match[1] + OTHER_NAMES[match[2]]),
    ),
    "sinks-of-transformers": ("tensor-name", rename(r"\.attn_sink$", ".sinks")),
    "head-named-as-layer": ("tensor-name", rename(r"^mtp\.0\.", "layers.4.")),
    "scale-inv": ("scale-name", rename(r"\.weight_scale$", ".weight_scale_inv")),
    "scale-of-linears": ("scale-name", rename(r"(_proj|attn\.w\w+)\.weight_scale$", r"\1.scale")),
    "wrong-shape": ("tensor-shape", replace("mtp.0.attn.q_norm.weight", lambda t: t[:64])),
    "wrong-group": ("scale-shape", replace(W2_SCALE, lambda t: t.repeat_interleave(2, dim=1))),
    "wrong-group-size-in-config": (
        "group-size",
        section(lambda q: q["config_groups"]["group_1"]["weights"].update(group_size=64)),
    ),
    "wrong-dtype": ("tensor-dtype", replace("mtp.0.e_proj.weight", lambda t: t.view(torch.int8))),
    "wrong-label": ("tensor-float16", replace("mtp.0.norm.weight", lambda t: t.view(torch.half))),
    "wrong-label-of-a-scale": ("scale-float16", replace(W2_SCALE, lambda t: t.view(torch.half))),
    "rounded-float32": ("float32-rounded", change(round_float32)),
    "fp8-compressor": ("compressor-fp8", store_a_compressor_in(torch.float8_e4m3fn)),
    "scaled-bf16-compressor": ("never-quantized", store_a_compressor_in(torch.bfloat16)),
    "dspark": ("dspark-drafter", add("mtp.1.enorm.weight")),
    "no-head-count": ("nextn-count", drop_config("num_nextn_predict_layers")),
    "head-count-null": ("nextn-count", set_config("num_nextn_predict_layers", None)),
    "head-count-0": ("nextn-count", set_config("num_nextn_predict_layers", 0)),
    "head-compressed": ("compress-ratios", set_config("compress_ratios", [0, 0, 4, 128, 4])),
    "no-quantization-config": ("quantization-config", drop_config("quantization_config")),
    "target-for-mtp": ("pattern-names-mtp", retarget("mtp_projections", [MTP_PROJECTIONS])),
    "ignore-for-mtp": ("pattern-names-mtp", section(ignore_shared_experts_as_mtp)),
    "unanchored-ignore": ("pattern-too-wide", ignore("re:.*e_proj")),
    "ignore-takes-the-head": ("pattern-too-wide", ignore(r"re:.*layers\.4\.attn\..*")),
    "ignore-is-null": ("ignore-null", section(lambda q: q.update(ignore=None))),
    "one-family-of-names": ("expert-target-names", retarget("group_1", [NATIVE_EXPERTS])),
    "projections-without-group": (
        "scheme-mismatch",
        section(lambda q: q["config_groups"].pop("mtp_projections")),
    ),
}
