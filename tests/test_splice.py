"""Splicing the bundled head into the bundled base: nothing lost, touched or guessed."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD
from mtp_graft.checkpoint.quantization_config import add_head, read_quantization
from mtp_graft.checkpoint.shards import INDEX_NAME, load_tensors
from mtp_graft.errors import GraftError
from mtp_graft.recipe import ALL_VARIANTS as VARIANTS
from mtp_graft.recipe import Variant
from mtp_graft.serving.command import ServeOptions, build_command, vllm_elsewhere
from mtp_graft.serving.doctor import diagnose
from mtp_graft.serving.doctor.hardware import find_target
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import verify
from quantized import TINY, edit_json, hashes, read_json, tiny_quantization, write_checkpoint
from serving.doctor_defects import LFS_POINTER

WRITTEN = {HEAD_SHARD, "MTP_QUANT_MANIFEST.json", "MTP_QUANT_MANIFEST.md", "recipe.yaml"}
SHARD = "model-00001-of-00003.safetensors"
EXPERT = "mtp.0.ffn.experts.5.w2"
ON_CPU = find_target(gpu="cpu")
Damage = Callable[[Path], object]


@pytest.fixture
def base(base: Path) -> Path:
    """A base that may be changed; with files in folders, and one that is hidden."""
    for name in ("encoding/chat.py", ".cache/huggingface/lock"):
        (base / name).parent.mkdir(parents=True)
        (base / name).write_text("x")
    metadata = {"note": "kept", "total_size": 5}
    edit_json(base / INDEX_NAME, lambda index: index.update(metadata=metadata))
    return base


def link_relatively(source: str, link: str) -> None:
    os.symlink(os.path.relpath(source, os.path.dirname(link)), link)


def test_files_not_in_the_index_are_left_out(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "encoding/consolidated-1.safetensors"):
        os.link(base / SHARD, base / name)
    (base / "model-9.safetensors").write_bytes(LFS_POINTER)
    os.mkfifo(base / "model-8.safetensors")
    upstream, out = tiny_model / "upstream", tmp_path / "out"
    found = {f.id: f.severity for f in diagnose(base, ON_CPU) if f.severity != "note"}
    assert found == {"shard-consolidated": "error"}, "vLLM takes it for the whole model"
    with pytest.raises(GraftError, match=r"consolidated-1.*: vLLM reads it in place of the shards"):
        build_command(ServeOptions(base), vllm_elsewhere("cuda"))
    splice(base, upstream, out)
    listed = {*read_json(out / INDEX_NAME)["weight_map"].values()}
    assert {path.name for path in out.glob("**/*.safetensors")} == listed
    assert verify(out, base, upstream)["ok"] and not diagnose(out, ON_CPU)


@pytest.mark.parametrize("variant", VARIANTS)
def test_linked_base_plus_head(tiny_base: Path, spliced: dict[str, Path], variant: Variant) -> None:
    out = spliced[variant]
    assert {p.name for p in out.iterdir()} == {p.name for p in tiny_base.iterdir()} | WRITTEN
    for source in tiny_base.iterdir():
        linked = os.path.samefile(source, out / source.name)
        assert linked == (source.name not in ("config.json", INDEX_NAME))
    tensors, index = load_tensors(out), read_json(out / INDEX_NAME)
    head = {name: HEAD_SHARD for name in tensors if name.startswith("mtp.")}
    assert index["weight_map"] == read_json(tiny_base / INDEX_NAME)["weight_map"] | head
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    old, new = read_json(tiny_base / "config.json"), read_json(out / "config.json")
    added = add_head(old["quantization_config"], 4, variant, "base")
    assert new == {**old, "num_nextn_predict_layers": 1, "quantization_config": added}


@pytest.mark.parametrize(
    ("variant", "dtype"), [("rtn", "base"), ("mxfp4", "fp8"), ("bf16", "bf16")]
)
def test_dspark_spliced(tiny_base: Path, dspark: Path, variant: Variant, dtype: Any) -> None:
    out = Path("out")
    splice(tiny_base, dspark, out, variant, linear_dtype=dtype)
    assert verify(out, tiny_base, dspark)["ok"] and not diagnose(out, ON_CPU)
    config, manifest = (read_json(out / n) for n in ("config.json", "MTP_QUANT_MANIFEST.json"))
    told = manifest["drafter"], manifest["tensors"]
    assert told == ("dspark", len(load_file(out / HEAD_SHARD)))
    keys = ("n_mtp_layers", "is_causal", "dspark_block_size")
    assert [config[key] for key in keys] == [3, False, 5]
    quantization = read_quantization(config)
    # What vLLM asks for without parts' names: a scheme under the fused names, or none at all.
    fp8 = ["layers.5.attn.fused_wqa_wkv", "layers.6.attn.wo_b", "context_wkv_proj"]
    fp8 += ["main_proj"] * (dtype != "bf16")
    fp8 += ["layers.4.ffn.shared_experts.gate_up_proj"] * (dtype == "fp8")
    plain = ["layers.6.ffn.shared_experts.down_proj"] * (dtype != "fp8")
    plain += ["main_proj"] * (dtype == "bf16")
    for names, kind in (fp8, "fp8"), (plain, "plain"):
        for name in names:
            assert quantization.kind_of(quantization.group_of(f"model.{name}")) == kind, name
    edit_json(out / "config.json", lambda c: c.pop("dspark_block_size"))
    assert "dspark-drafter" in {each.id for each in diagnose(out, ON_CPU)}


@pytest.mark.parametrize("how", ["linked", "copied", "another file system", "symbolic links"])
def test_files_are_linked_or_copied(how: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, out = base, Path("elsewhere/deep/out")
    if how == "another file system":
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EXDEV, "Invalid link")))
    if how == "symbolic links":  # as in the hub's cache, whose snapshots are links to blobs
        given = Path("snapshot")
        shutil.copytree(base, given, copy_function=link_relatively)
    splice(given, TINY / "upstream", out, copy=how == "copied")
    for name in (SHARD, "encoding/chat.py"):
        assert not (out / name).is_symlink()
        linked = os.path.samefile(base / name, out / name)
        assert linked == (how in ("linked", "symbolic links"))
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not (out / ".cache").exists()
    assert read_json(out / INDEX_NAME)["metadata"]["note"] == "kept"


def test_same_inputs_same_bytes(tiny_base: Path, quantized: Path, spliced: dict[str, Path]) -> None:
    slower, out = shutil.copytree(quantized, Path("quantize")), Path("out")
    report = read_json(slower / "report.json") | {"seconds": {"gptq": 99}, "peak_host_bytes": 5}
    (slower / "report.json").write_text(json.dumps(report))
    upstream = shutil.copytree(TINY / "upstream", Path("upstream"))
    not_fetched = {"layers.0.x": "none"}
    edit_json(upstream / INDEX_NAME, lambda index: index["weight_map"].update(not_fetched))

    plan = splice(tiny_base, upstream, out, "gptq", quantized=slower)
    assert hashes(out) == hashes(spliced["gptq"])
    assert plan.bytes == sum(tensor.nbytes for tensor in load_file(out / HEAD_SHARD).values())
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    splice(tiny_base, upstream, out, "gptq", quantized=quantized)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(GraftError, match="already exists, and not from these inputs"):
        splice(tiny_base, upstream, out, "rtn")
    with pytest.raises(GraftError, match=r"new: is in .*; choose another"):
        splice(tiny_base, upstream, upstream / "new")
    (out / HEAD_SHARD).write_bytes((out / HEAD_SHARD).read_bytes()[:-1])
    with pytest.raises(GraftError, match=r"model-mtp-w4a16\.safetensors: not a readable"):
        splice(tiny_base, upstream, out, "gptq", quantized=quantized)


def set_config(**values: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


def unlist(name: str) -> Damage:
    return lambda folder: edit_json(folder / INDEX_NAME, lambda i: i["weight_map"].pop(name))


def lose_the_heads_experts(folder: Path) -> None:
    section = tiny_quantization()
    section["config_groups"]["group_1"]["targets"] = ["re:.*rs.[0-3].*experts"]
    set_config(quantization_config=section)(folder)


def put(changes: dict[str, Tensor | None]) -> Damage:
    """Return what replaces tensors, and removes those that are to be None."""

    def rewrite(folder: Path) -> None:
        tensors = load_tensors(folder) | changes
        for path in folder.glob("*.safetensors"):
            path.unlink()
        write_checkpoint({name: t for name, t in tensors.items() if t is not None}, folder)

    return rewrite


def relabel(change: Callable[[str, Tensor], tuple[str, Tensor]]) -> Damage:
    def rewrite(folder: Path) -> None:
        changed = dict(change(name, t) for name, t in load_tensors(folder).items())
        put({**dict.fromkeys(load_tensors(folder)), **changed})(folder)

    return rewrite


def scales(suffix: str, dtype: torch.dtype) -> Damage:
    """Return what gives FP8 scales another name, and values or bytes of another dtype."""

    def change(name: str, t: Tensor) -> tuple[str, Tensor]:
        if not name.endswith(".scale") or ".experts." in name:
            return name, t
        return name.replace(".scale", suffix), t.to(dtype) if dtype.itemsize > 1 else t.view(dtype)

    return relabel(change)


#: Masters as others store them.
BIAS = "te.e_score_correction_bias"
REPACKED: dict[str, Damage] = {
    "scales as bytes": scales(".scale", torch.uint8),
    "scales in BF16": scales(".weight_scale", torch.bfloat16),
    "scales as of DeepSeek-V3": scales(".weight_scale_inv", torch.float32),
    "transformers' bias": relabel(lambda n, t: (n.replace("te.bias", BIAS), t)),
    "copies of the target's": put(
        dict.fromkeys(("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"), torch.zeros(2, 2))
    ),
}


@pytest.mark.parametrize("name", REPACKED)
def test_repacked_gives_the_same_head(spliced: dict[str, Path], tiny_base: Path, name: str) -> None:
    upstream, out = Path("upstream"), Path("out")
    shutil.copytree(TINY / "upstream", upstream)
    REPACKED[name](upstream)
    splice(tiny_base, upstream, out)
    assert (out / HEAD_SHARD).read_bytes() == (spliced["mxfp4"] / HEAD_SHARD).read_bytes()
    assert verify(out, tiny_base, upstream)["ok"]


NO_EXPERT = put({f"{EXPERT}.weight": None, f"{EXPERT}.scale": None})
STRANGER = put({"mtp.0.emb.weight": torch.zeros(2)})
NOT_A_NUMBER = put({"mtp.0.norm.weight": torch.full([256], torch.nan).bfloat16()})
MISLABELLED = put({"mtp.0.norm.weight": torch.ones(256).bfloat16().view(torch.half)})
PLAIN_EXPERT = put({f"{EXPERT}.scale": None, f"{EXPERT}.weight": torch.zeros(256, 256)})
A_NUMBER = put({f"{EXPERT}.weight": torch.zeros((), dtype=torch.int8)})
ROUNDED = put({"mtp.0.hc_attn_fn": torch.zeros(24, 1024).half()})


@pytest.mark.parametrize(
    ("which", "damage", "message"),
    [
        ("base", unlist("norm.weight"), r"norm\.weight: in .*, not in model.saf"),
        ("base", set_config(moe_intermediate_size=512), r"base: .* expected .512, 32. by config"),
        ("base", set_config(hidden_size=128), r"base: .*\(\d+ in all\); expected .* by config"),
        ("base", set_config(num_attention_heads=8), r"base: .*\(\d+ in all\); expected .* by con"),
        ("base", set_config(hc_mult=2), r"base: .*\(\d+ in all\); expected .* by config"),
        ("base", set_config(quantization_config=None), r"base/config\.json: .*_config.*instead"),
        ("base", lose_the_heads_experts, r"base/config\.json: .* experts are not quantized; exp"),
        ("upstream", unlist(f"{EXPERT}.scale"), rf"does not list {EXPERT}\.scale"),
        ("upstream", NO_EXPERT, rf"{EXPERT}\.weight is none, expected \[256, 256\] .*\(1 of the"),
        ("upstream", STRANGER, r"mtp\.0\.emb\.weight is \[2\], expected none"),
        ("upstream", NOT_A_NUMBER, r"am/model\.safetensors: mtp\.0\.norm: has a value that is no"),
        ("upstream", PLAIN_EXPERT, rf"am/model.*{EXPERT}: is plain, not mxfp4; take"),
        ("upstream", A_NUMBER, rf"am/model.*{EXPERT}: has weight_packed \[\] .*; a tensor is m"),
        ("upstream", scales(".scale", torch.float8_e4m3fn), r"am/model.*_scale .*_e4m3fn, expec"),
        ("upstream", MISLABELLED, r"norm\.weight is torch\.float16, expected torch\.bfloat16"),
        ("upstream", ROUNDED, r"hc_attn_fn is torch\.float16, expected torch\.float32"),
    ],
)
def test_damage_named(base: Path, tmp_path: Path, which: str, damage: Damage, message: str) -> None:
    shutil.copytree(TINY / "upstream", tmp_path / "upstream")
    damage(tmp_path / which)
    with pytest.raises(GraftError, match=message):
        splice(base, tmp_path / "upstream", tmp_path / "out", "rtn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "upstream"]


@pytest.mark.parametrize(
    ("call", "said"),
    [("fsync", r"model-mtp-w4a16\.safetensors: the disk is full"), ("link", "out: the disk is f")],
)
def test_full_disk(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, call: str, said: str) -> None:
    monkeypatch.setattr(os, call, Mock(side_effect=OSError(errno.ENOSPC, "No space")))
    with pytest.raises(GraftError, match=said):
        splice(tiny_base, TINY / "upstream", Path("out"), "mxfp4")
    assert list(Path().iterdir()) == []


def test_what_a_killed_splice_left_is_replaced(tiny_base: Path, spliced: dict[str, Path]) -> None:
    Path(".out.tmp").mkdir()
    Path(".out.tmp/half-written").write_text("x")
    before = hashes(tiny_base)
    splice(tiny_base, TINY / "upstream", Path("out"), "mxfp4")
    assert [path.name for path in Path().iterdir()] == ["out"]
    assert hashes(Path("out")) == hashes(spliced["mxfp4"]) and hashes(tiny_base) == before
