"""Splicing the bundled head into the bundled base: nothing lost, touched or guessed."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from mtp_graft.checkpoint import shards
from mtp_graft.checkpoint.quant_manifest import MANIFEST_NAME, MANIFEST_TEXT_NAME, RECIPE_NAME
from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.checkpoint.shards import load_tensors, save_shard
from mtp_graft.checkpoint.spliced import HEAD_SHARD
from mtp_graft.errors import GraftError
from mtp_graft.quant import int4, mxfp4
from mtp_graft.stages import splice as stage
from mtp_graft.stages.splice import Variant, splice
from quantized import write_quantized
from references import decode_fp8_blocks, decode_int4, decode_mxfp4

INDEX = "model.safetensors.index.json"
VARIANTS: tuple[Variant, ...] = ("rtn", "gptq", "mxfp4", "bf16")
WRITTEN = {HEAD_SHARD, MANIFEST_NAME, MANIFEST_TEXT_NAME, RECIPE_NAME}
EXPERTS = [f"mtp.0.ffn.experts.{e}.{w}" for e in range(64) for w in ("w1", "w2", "w3")]
SHARED = [f"mtp.0.ffn.shared_experts.{w}" for w in ("w1", "w2", "w3")]
FP8 = [f"mtp.0.attn.{n}" for n in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")]
FP8 += ["mtp.0.e_proj", "mtp.0.h_proj"]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that links stay on one file system and a broken splice harms nothing."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(tiny_model / "base", folder)
    index = read_json(folder / INDEX)
    index["metadata"]["note"] = "kept"
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def before(base: Path) -> dict[str, str]:
    return hashes(base)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, upstream: dict[str, Tensor]) -> Path:
    return write_quantized(tmp_path_factory.mktemp("run") / "quantize", upstream)


@pytest.fixture(scope="module")
def spliced(
    base: Path, before: dict[str, str], tiny_model: Path, quantized: Path
) -> dict[str, Path]:
    assert before
    for variant in VARIANTS:
        given = quantized if variant == "gptq" else None
        out = base.with_name(variant)
        splice(base, tiny_model / "upstream", out, variant, quantized=given)
    return {variant: base.with_name(variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def upstream(tiny_model: Path) -> dict[str, Tensor]:
    return load_tensors(tiny_model / "upstream")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def checkpoint(spliced: dict[str, Path], variant: Variant) -> Path:
    return spliced[variant]


@pytest.fixture
def head(checkpoint: Path) -> dict[str, Tensor]:
    return {name: t for name, t in load_tensors(checkpoint).items() if name.startswith("mtp.")}


def small_checkpoint(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    save_file({name: torch.zeros(2) for name in names}, folder / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# The base


def test_splice_keeps_base_shards_byte_identical(
    base: Path, before: dict[str, str], checkpoint: Path
) -> None:
    assert hashes(base) == before
    after = hashes(checkpoint)
    assert set(after) == {*before, *WRITTEN}
    assert {name for name in before if after[name] != before[name]} == {"config.json", INDEX}


def test_base_files_are_linked_not_copied(base: Path, checkpoint: Path) -> None:
    for source in base.iterdir():
        linked = os.path.samefile(source, checkpoint / source.name)
        assert linked == (source.name not in ("config.json", INDEX))


def test_copy_makes_files_of_its_own(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    splice(base, tiny_model / "upstream", tmp_path / "out", "mxfp4", copy=True)
    shard = "model-00001-of-00003.safetensors"
    assert not os.path.samefile(base / shard, tmp_path / "out" / shard)
    assert hashes(tmp_path / "out")[shard] == hashes(base)[shard]


def test_another_file_system_gets_copies(
    base: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    splice(base, tiny_model / "upstream", tmp_path / "out", "mxfp4")
    shard = "model-00001-of-00003.safetensors"
    assert hashes(tmp_path / "out")[shard] == hashes(base)[shard]


def test_a_base_of_symbolic_links_is_linked_through(
    base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """As in the hub's cache, whose snapshots are relative links to blobs."""
    snapshot = tmp_path / "cache" / "snapshot"
    snapshot.mkdir(parents=True)
    for source in base.iterdir():
        os.link(source, tmp_path / "cache" / source.name)
        (snapshot / source.name).symlink_to(Path("..") / source.name)
    out = tmp_path / "elsewhere" / "deep" / "out"
    splice(snapshot, tiny_model / "upstream", out, "mxfp4")
    shard = out / "model-00001-of-00003.safetensors"
    assert not shard.is_symlink()
    assert os.path.samefile(shard, base / shard.name)


# Index and config


def test_index_is_the_union_and_its_total_size_true(
    base: Path, checkpoint: Path, head: dict[str, Tensor]
) -> None:
    index = read_json(checkpoint / INDEX)
    own = {name: shard for name, shard in index["weight_map"].items() if name.startswith("mtp.")}
    assert own == dict.fromkeys(head, HEAD_SHARD)
    rest = {name: s for name, s in index["weight_map"].items() if not name.startswith("mtp.")}
    assert rest == read_json(base / INDEX)["weight_map"]
    values = load_tensors(checkpoint).values()
    assert index["metadata"] == {
        "note": "kept",
        "total_size": sum(value.numel() * value.element_size() for value in values),
    }


def test_total_size_is_true_even_if_the_base_states_none(
    base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for name, metadata in (("none", {}), ("wrong", {"metadata": {"total_size": 5}})):
        other = shutil.copytree(base, tmp_path / name, copy_function=os.link)
        (other / INDEX).unlink()
        weight_map = read_json(base / INDEX)["weight_map"]
        (other / INDEX).write_text(json.dumps({**metadata, "weight_map": weight_map}))
        out = tmp_path / f"{name}-out"
        splice(other, tiny_model / "upstream", out, "mxfp4")
        values = load_tensors(out).values()
        expected = sum(value.numel() * value.element_size() for value in values)
        assert read_json(out / INDEX)["metadata"]["total_size"] == expected


def test_config_changes_where_the_head_needs_it(
    base: Path, checkpoint: Path, variant: Variant
) -> None:
    old, new = read_json(base / "config.json"), read_json(checkpoint / "config.json")
    assert new["num_nextn_predict_layers"] == 1
    changed = {key for key in {*old, *new} if old.get(key) != new.get(key)}
    assert changed == {"quantization_config"}
    experts: Any = {"rtn": "int4", "gptq": "int4"}.get(variant, variant)
    added = add_head(old["quantization_config"], 4, experts, "base")
    assert new["quantization_config"] == added


def test_num_nextn_predict_layers_is_set_where_the_base_says_zero(
    base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "base", copy_function=os.link)
    config = read_json(base / "config.json")
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    splice(other, tiny_model / "upstream", tmp_path / "out", "mxfp4")
    assert read_json(tmp_path / "out" / "config.json")["num_nextn_predict_layers"] == 1


def test_two_runs_give_the_same_bytes_and_count_them(
    base: Path,
    checkpoint: Path,
    head: dict[str, Tensor],
    variant: Variant,
    tiny_model: Path,
    quantized: Path,
    tmp_path: Path,
) -> None:
    given = quantized if variant == "gptq" else None
    result = splice(base, tiny_model / "upstream", tmp_path / "again", variant, quantized=given)
    assert hashes(tmp_path / "again") == hashes(checkpoint)
    written = sum(tensor.numel() * tensor.element_size() for tensor in head.values())
    assert (result.tensors, result.bytes_written) == (len(head), written)


# The head's tensors


def stored_names(variant: Variant, upstream: dict[str, Tensor]) -> set[str]:
    plain = {name for name in upstream if f"{name.removesuffix('.weight')}.scale" not in upstream}
    plain = {name for name in plain if not name.endswith(".scale")}
    parts = {
        "rtn": ("weight_packed", "weight_scale", "weight_shape"),
        "gptq": ("weight_packed", "weight_scale", "weight_shape"),
        "mxfp4": ("weight_packed", "weight_scale"),
        "bf16": ("weight",),
    }[variant]
    experts = {f"{stem}.{part}" for stem in EXPERTS for part in parts}
    fp8 = {f"{stem}.{part}" for stem in FP8 for part in ("weight", "weight_scale")}
    return plain | experts | fp8 | {f"{stem}.weight" for stem in SHARED}


def test_every_upstream_tensor_is_accounted_for(
    head: dict[str, Tensor], upstream: dict[str, Tensor], variant: Variant
) -> None:
    assert set(head) == stored_names(variant, upstream)
    scaled = {f"{stem}.weight" for stem in (*EXPERTS, *FP8, *SHARED)}
    plain = set(head) & set(upstream) - scaled
    assert len(plain) == 19
    for name in plain:
        assert head[name].dtype == upstream[name].dtype
        assert torch.equal(head[name], upstream[name]), name


def test_fp8_codes_are_untouched_and_scales_equal_as_numbers(
    head: dict[str, Tensor], upstream: dict[str, Tensor]
) -> None:
    for stem in FP8:
        codes, theirs = head[f"{stem}.weight"], upstream[f"{stem}.weight"]
        assert codes.dtype == torch.float8_e4m3fn
        assert torch.equal(codes.view(torch.uint8), theirs.view(torch.uint8))
        scale = head[f"{stem}.weight_scale"]
        assert scale.dtype == torch.bfloat16
        assert torch.equal(scale.double(), upstream[f"{stem}.scale"].double())


def test_shared_experts_are_decoded_without_loss(
    head: dict[str, Tensor], upstream: dict[str, Tensor]
) -> None:
    for stem in SHARED:
        exact = decode_fp8_blocks(upstream[f"{stem}.weight"], upstream[f"{stem}.scale"])
        assert head[f"{stem}.weight"].dtype == torch.bfloat16
        assert torch.equal(head[f"{stem}.weight"].double(), exact)


def expert_values(head: dict[str, Tensor], stem: str, variant: Variant) -> Tensor:
    """Return what a spliced expert matrix stands for, float64, read by slow loops."""
    if variant == "bf16":
        assert head[f"{stem}.weight"].dtype == torch.bfloat16
        return head[f"{stem}.weight"].double()
    packed, scale = head[f"{stem}.weight_packed"], head[f"{stem}.weight_scale"]
    if variant == "mxfp4":
        assert packed.dtype == scale.dtype == torch.uint8
        return decode_mxfp4(packed, scale)
    assert packed.dtype == torch.int32 and scale.dtype == torch.bfloat16
    shape = head[f"{stem}.weight_shape"]
    assert shape.dtype == torch.int64 and shape.tolist() == [256, 256]
    return decode_int4(packed, scale, group_size=128)


def test_experts_are_upstreams_exactly_or_the_nearest_int4(
    head: dict[str, Tensor], upstream: dict[str, Tensor], variant: Variant
) -> None:
    for stem in (EXPERTS[0], EXPERTS[94], EXPERTS[-1]):
        exact = decode_mxfp4(upstream[f"{stem}.weight"], upstream[f"{stem}.scale"])
        values = expert_values(head, stem, variant)
        if variant in ("rtn", "gptq"):
            step = head[f"{stem}.weight_scale"].double().repeat_interleave(128, dim=1)
            # Half a step, and a little more at the end codes, where the scale was rounded.
            assert ((values - exact).abs() / step).max() <= 0.54
            assert not torch.equal(values, exact)
        else:
            assert torch.equal(values, exact)


def test_gptq_experts_are_the_quantize_stages_bytes(
    spliced: dict[str, Path], quantized: Path
) -> None:
    head = load_tensors(spliced["gptq"])
    found = 0
    for path in (quantized / "gptq").iterdir():
        with shards.open_shard(path) as file:
            for name in file.keys():  # noqa: SIM118
                assert torch.equal(head[name], file.get_tensor(name)), name
                found += 1
    assert found == 3 * len(EXPERTS)


def test_the_shard_is_what_safetensors_itself_would_write(
    checkpoint: Path, head: dict[str, Tensor], tmp_path: Path
) -> None:
    save_shard(head, tmp_path / "whole.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (checkpoint / HEAD_SHARD).read_bytes()


def scheme_of(checkpoint: Path, storage: str) -> QuantizationScheme:
    groups = read_json(checkpoint / "config.json")["quantization_config"]["config_groups"]
    group = next(group for group in groups.values() if group["format"] == storage)
    weights = QuantizationArgs.model_validate(group["weights"])
    return QuantizationScheme(targets=group["targets"], weights=weights)


def parts_of(head: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    found = {name: t for name, t in head.items() if name.startswith(f"{stem}.")}
    return {name.removeprefix(f"{stem}."): tensor for name, tensor in found.items()}


def test_compressed_tensors_reads_every_rtn_expert_as_we_do(spliced: dict[str, Path]) -> None:
    head = load_tensors(spliced["rtn"])
    scheme = scheme_of(spliced["rtn"], "pack-quantized")
    for stem in EXPERTS:
        parts = parts_of(head, stem)
        theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        ours = int4.decode(int4.unpack(parts["weight_packed"]), parts["weight_scale"])
        assert torch.equal(theirs, ours.to(theirs.dtype))


def test_compressed_tensors_reads_every_mxfp4_expert_as_upstreams(
    spliced: dict[str, Path], upstream: dict[str, Tensor]
) -> None:
    head = load_tensors(spliced["mxfp4"])
    scheme = scheme_of(spliced["mxfp4"], "mxfp4-pack-quantized")
    for stem in EXPERTS:
        theirs = MXFP4PackedCompressor.decompress(parts_of(head, stem), scheme)["weight"]
        ours = mxfp4.decode(upstream[f"{stem}.weight"], upstream[f"{stem}.scale"])
        assert torch.equal(theirs.float(), ours)


# What it refuses


def test_a_base_that_has_a_head_is_refused(
    spliced: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(GraftError, match=r"already has a head \(mtp\.0\."):
        splice(spliced["mxfp4"], tiny_model / "upstream", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dspark_drafter_is_refused(base: Path, tmp_path: Path) -> None:
    names = [f"mtp.{block}.e_proj.weight" for block in range(3)]
    dspark = small_checkpoint(tmp_path / "dspark", names)
    with pytest.raises(GraftError, match=r"has blocks mtp\.\{0,1,2\}.*DSpark"):
        splice(base, dspark, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_upstream_without_a_head_is_refused(base: Path, tmp_path: Path) -> None:
    headless = small_checkpoint(tmp_path / "headless", ["layers.0.attn.wq_a.weight"])
    with pytest.raises(GraftError, match=r"has no mtp\.\* tensors"):
        splice(base, headless, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_folder_is_refused_and_left_alone(
    base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(GraftError, match=r"out: already exists"):
        splice(base, tiny_model / "upstream", tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious"]


@pytest.mark.parametrize("config", [None, "{", '{"num_hidden_layers": 4}'])
def test_a_base_without_quantization_config_is_refused(
    tiny_model: Path, tmp_path: Path, config: str | None
) -> None:
    plain = small_checkpoint(tmp_path / "plain", ["layers.0.attn.wq_a.weight"])
    if config is not None:
        (plain / "config.json").write_text(config)
    with pytest.raises(GraftError, match=r"plain/config\.json: .*quantization_config"):
        splice(plain, tiny_model / "upstream", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gptq_needs_the_quantize_stage(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="run `mtp-graft quantize` first"):
        splice(base, tiny_model / "upstream", tmp_path / "out", "gptq")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GraftError, match=r"report\.json: not found; run `mtp-graft quantize`"):
        splice(
            base, tiny_model / "upstream", tmp_path / "out", "gptq", quantized=tmp_path / "empty"
        )
    assert not (tmp_path / "out").exists()


# Broken inputs: (which folder, damage, message)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change a checkpoint's tensors, and keep its index true."""
    tensors = load_tensors(folder)
    change(tensors)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    shards.save_checkpoint(tensors, folder, 2**30)


def set_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = read_json(folder / INDEX)
    change(index["weight_map"])
    (folder / INDEX).unlink()
    (folder / INDEX).write_text(json.dumps(index))


def set_config(folder: Path, **changes: object) -> None:
    config = {**read_json(folder / "config.json"), **changes}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def truncate_shard(folder: Path) -> None:
    path, content = last_shard(folder), last_shard(folder).read_bytes()
    path.unlink()  # the base's is a link
    path.write_bytes(content[:-1])


def garble_header(folder: Path) -> None:
    path, content = last_shard(folder), last_shard(folder).read_bytes()
    path.unlink()
    path.write_bytes(content[:8] + b"x" * 100 + content[108:])


def list_a_stranger(folder: Path) -> None:
    set_index(folder, lambda m: m.update({"mtp.0.stranger": last_shard(folder).name}))


def list_a_layer(folder: Path) -> None:
    set_index(folder, lambda m: m.update({"layers.9.stranger": last_shard(folder).name}))


def unlist_norm(folder: Path) -> None:
    set_index(folder, lambda m: m.pop("norm.weight"))


def unlist_expert(folder: Path) -> None:
    set_index(folder, lambda m: m.pop("mtp.0.ffn.experts.5.w2.scale"))


def drop_expert(folder: Path) -> None:
    rewrite(folder, lambda t: [t.pop(n) for n in list(t) if ".experts.5.w2." in n].clear())


def drop_hc(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("mtp.0.hc_ffn_base").zero_())


def drop_codes(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("mtp.0.ffn.experts.5.w2.weight").zero_())


def add_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"mtp.0.emb.weight": torch.zeros(2)}))


def downcast(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"mtp.0.hc_attn_fn": t["mtp.0.hc_attn_fn"].bfloat16()}))


def cut_scale(folder: Path) -> None:
    name = "mtp.0.ffn.experts.7.w1.scale"
    rewrite(folder, lambda t: t.update({name: t[name][:, :4]}))


def other_model(folder: Path) -> None:
    set_config(folder, moe_intermediate_size=512)


def more_experts(folder: Path) -> None:
    set_config(folder, n_routed_experts=128)


def no_heads(folder: Path) -> None:
    config = read_json(folder / "config.json")
    del config["num_attention_heads"]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))


def regroup(folder: Path) -> None:
    quantization = read_json(folder / "config.json")["quantization_config"]
    quantization["config_groups"]["group_1"]["weights"]["group_size"] = 96
    set_config(folder, quantization_config=quantization)


def narrow_targets(folder: Path) -> None:
    quantization = read_json(folder / "config.json")["quantization_config"]
    quantization["config_groups"]["group_1"]["targets"] = [r"re:.*layers\.[0-3]\..*experts.*"]
    set_config(folder, quantization_config=quantization)


@pytest.mark.parametrize(
    ("which", "damage", "message"),
    [
        ("base", truncate_shard, r"00003-of-00003\.safetensors: not a readable safetensors"),
        ("base", garble_header, r"00003-of-00003\.safetensors: not a readable safetensors"),
        ("base", list_a_layer, r"has no layers\.9\.stranger"),
        ("base", unlist_norm, r"does not list norm\.weight \(1 in all\)"),
        (
            "base",
            other_model,
            r"w1\.weight is \[256, 256\], expected \[512, 256\] by the",
        ),
        ("base", more_experts, r"has no mtp\.0\.ffn\.experts\.100\.w1\.weight \(192 of the head's"),
        ("base", no_heads, r"has no 'num_attention_heads'"),
        ("base", regroup, r"experts\.\d+\.w\d: 256 inputs are no multiple of the group size 96"),
        ("base", narrow_targets, r"model\.layers\.4\.ffn\.experts\.0\.w1 would load as unquant"),
        ("upstream", truncate_shard, r"upstream/.*not a readable safetensors"),
        ("upstream", garble_header, r"upstream/.*not a readable safetensors"),
        ("upstream", list_a_stranger, r"has no mtp\.0\.stranger"),
        ("upstream", unlist_expert, r"does not list mtp\.0\.ffn\.experts\.5\.w2\.scale"),
        (
            "upstream",
            drop_expert,
            r"has no mtp\.0\.ffn\.experts\.5\.w2\.weight \(1 of the",
        ),
        ("upstream", drop_hc, r"has no mtp\.0\.hc_ffn_base \(1 of"),
        ("upstream", drop_codes, r"experts\.5\.w2\.scale has no weight"),
        ("upstream", add_tensor, r"has mtp\.0\.emb\.weight \(1 tensors that the one-block head"),
        ("upstream", downcast, r"hc_attn_fn is torch\.bfloat16, expected torch\.float32"),
        ("upstream", cut_scale, r"experts\.7\.w1: scale is \[256, 4\].*expected \[256, 8\]"),
    ],
)
def test_broken_inputs_are_one_error_and_nothing_is_left(
    base: Path,
    tiny_model: Path,
    tmp_path: Path,
    which: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    shutil.copytree(base, tmp_path / "base", copy_function=os.link)
    shutil.copytree(tiny_model / "upstream", tmp_path / "upstream")
    damage(tmp_path / which)
    with pytest.raises(GraftError, match=message):
        splice(tmp_path / "base", tmp_path / "upstream", tmp_path / "out", "rtn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "upstream"]


def test_gptq_experts_of_another_group_size_are_refused(
    base: Path, tiny_model: Path, quantized: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(quantized, tmp_path / "quantize")
    path = sorted((other / "gptq").iterdir())[0]
    with shards.open_shard(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "mtp.0.ffn.experts.3.w1.weight_scale"
    tensors[name] = tensors[name].repeat_interleave(2, dim=1)
    save_file(tensors, path)
    with pytest.raises(GraftError, match=r"experts\.3\.w1: scale is \[256, 4\].*group 128"):
        splice(base, tiny_model / "upstream", tmp_path / "out", "gptq", quantized=other)
    path.unlink()
    with pytest.raises(GraftError, match=r"experts\.\d+\.w1\.weight_packed: not among"):
        splice(base, tiny_model / "upstream", tmp_path / "out", "gptq", quantized=other)
    assert [path.name for path in tmp_path.iterdir()] == ["quantize"]


def test_other_shards_of_the_upstream_need_not_be_there(
    base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    upstream = shutil.copytree(tiny_model / "upstream", tmp_path / "upstream")
    splice(base, upstream, tmp_path / "whole", "mxfp4")
    set_index(upstream, lambda m: m.update({"layers.0.attn_norm.weight": "not-fetched"}))
    splice(base, upstream, tmp_path / "out", "mxfp4")
    written, whole = (tmp_path / name / HEAD_SHARD for name in ("out", "whole"))
    assert written.read_bytes() == whole.read_bytes()


# Full disks, kills, and doing it again


def fill_disk(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_too_little_room_is_found_before_writing(
    base: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: Usage)
    monkeypatch.setattr(stage, "stream_shard", lambda *_: pytest.fail("written to"))
    with pytest.raises(GraftError, match=r"1,000 bytes free, [\d,]+ needed for model-mtp"):
        splice(base, tiny_model / "upstream", tmp_path / "out", "bf16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("owner", "function", "message"),
    [
        (shards.os, "fsync", r"model-mtp-w4a16\.safetensors: the disk is full; 8,212,840 bytes"),
        (stage.os, "link", r"cannot link or copy .*No space left"),
        (stage, "write_json", r"out: the disk is full"),
    ],
)
def test_a_full_disk_is_one_error_and_nothing_is_left(
    base: Path,
    before: dict[str, str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    function: str,
    message: str,
) -> None:
    monkeypatch.setattr(owner, function, fill_disk)
    with pytest.raises(GraftError, match=message):
        splice(base, tiny_model / "upstream", tmp_path / "out", "mxfp4")
    assert list(tmp_path.iterdir()) == []
    assert hashes(base) == before


def test_what_a_killed_splice_left_is_removed(
    base: Path, spliced: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    left = tmp_path / ".out.tmp"
    left.mkdir()
    (left / HEAD_SHARD).write_bytes(b"half")
    (left / "stray").write_bytes(b"stray")
    splice(base, tiny_model / "upstream", tmp_path / "out", "mxfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert hashes(tmp_path / "out") == hashes(spliced["mxfp4"])


#: The stage in a process of its own, with time enough between two tensors to be killed there.
SLOW_SPLICE = """
import sys, time
from pathlib import Path
from mtp_graft.stages import splice as stage

stored_tensors = stage._stored_tensors

def slowly(plan):
    for item in stored_tensors(plan):
        time.sleep(0.01)
        yield item

stage._stored_tensors = slowly
base, upstream, out = map(Path, sys.argv[1:])
stage.splice(base, upstream, out, "mxfp4")
"""


def test_a_splice_that_sigkill_ended_in_the_shard_is_done_again(
    base: Path, before: dict[str, str], spliced: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    upstream, out = tiny_model / "upstream", tmp_path / "out"
    command = [sys.executable, "-c", SLOW_SPLICE, *map(str, (base, upstream, out))]
    with subprocess.Popen(command) as process:
        while not list(tmp_path.glob(f".out.tmp/*{HEAD_SHARD}*")):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.tmp"]
    splice(base, upstream, out, "mxfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert hashes(out) == hashes(spliced["mxfp4"])
    assert hashes(base) == before


def test_a_splice_of_the_same_inputs_is_not_done_again(
    base: Path,
    spliced: dict[str, Path],
    tiny_model: Path,
    quantized: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "stream_shard", lambda *_: pytest.fail("written again"))
    upstream, out = tiny_model / "upstream", spliced["gptq"]
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    result = splice(base, upstream, out, "gptq", quantized=quantized)
    assert result.already_done and result.tensors == 612
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(GraftError, match="already exists, and not from these inputs"):
        splice(base, upstream, out, "rtn")


def test_a_damaged_earlier_splice_is_not_taken_for_done(
    base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    splice(base, tiny_model / "upstream", out, "mxfp4")
    (out / HEAD_SHARD).write_bytes((out / HEAD_SHARD).read_bytes()[:-1])
    with pytest.raises(GraftError, match=r"model-mtp-w4a16\.safetensors: not a readable"):
        splice(base, tiny_model / "upstream", out, "mxfp4")


def test_seconds_and_memory_of_quantizing_do_not_reach_the_checkpoint(
    base: Path, spliced: dict[str, Path], tiny_model: Path, quantized: Path, tmp_path: Path
) -> None:
    slower = shutil.copytree(quantized, tmp_path / "quantize")
    report = read_json(slower / "report.json")
    report |= {"seconds": {"gptq": 99}, "peak_host_bytes": 5}
    (slower / "report.json").write_text(json.dumps(report))
    splice(base, tiny_model / "upstream", tmp_path / "out", "gptq", quantized=slower)
    assert hashes(tmp_path / "out") == hashes(spliced["gptq"])


def test_files_in_folders_of_the_base_come_along(
    base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "base", copy_function=os.link)
    for name in ("encoding/chat.py", ".cache/huggingface/lock"):
        (other / name).parent.mkdir(parents=True)
        (other / name).write_text("x")
    splice(other, tiny_model / "upstream", tmp_path / "out", "mxfp4")
    assert os.path.samefile(other / "encoding/chat.py", tmp_path / "out" / "encoding/chat.py")
    assert not (tmp_path / "out" / ".cache").exists()


@pytest.mark.parametrize("function", ["stream_shard", "write_index", "write_json"])
def test_an_interrupted_splice_leaves_nothing_and_can_be_repeated(
    base: Path,
    before: dict[str, str],
    spliced: dict[str, Path],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
) -> None:
    def stop(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, function, stop)
        with pytest.raises(KeyboardInterrupt):
            splice(base, tiny_model / "upstream", tmp_path / "out", "mxfp4")
    assert not (tmp_path / "out").exists()
    assert hashes(base) == before
    result = splice(base, tiny_model / "upstream", tmp_path / "out", "mxfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert hashes(tmp_path / "out") == hashes(spliced["mxfp4"])
    assert (result.checkpoint, result.variant) == (tmp_path / "out", "mxfp4")
