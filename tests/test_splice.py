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
from safetensors.torch import save_file
from torch import Tensor

from mtp_graft.checkpoint import files, shards
from mtp_graft.checkpoint.quant_manifest import (
    HEAD_SHARD,
    MANIFEST_NAME,
    MANIFEST_TEXT_NAME,
    RECIPE_NAME,
)
from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.checkpoint.shards import load_tensors, save_shard
from mtp_graft.errors import GraftError
from mtp_graft.stages import splice as stage
from mtp_graft.stages.splice import Variant, splice
from quantized import write_checkpoint, write_quantized
from references import decode_int4, decode_mxfp4

INDEX = "model.safetensors.index.json"
VARIANTS: tuple[Variant, ...] = ("rtn", "gptq", "mxfp4", "bf16")
WRITTEN = {HEAD_SHARD, MANIFEST_NAME, MANIFEST_TEXT_NAME, RECIPE_NAME}
SHARD = "model-00001-of-00003.safetensors"


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
    index["metadata"] = {"note": "kept", "total_size": 5}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def before(base: Path) -> dict[str, str]:
    return hashes(base)


@pytest.fixture(scope="module")
def upstream(tiny_model: Path) -> Path:
    return tiny_model / "upstream"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, upstream: Path) -> Path:
    return write_quantized(tmp_path_factory.mktemp("run") / "quantize", load_tensors(upstream))


@pytest.fixture(scope="module")
def spliced(base: Path, before: dict[str, str], upstream: Path, quantized: Path) -> dict[str, Path]:
    for variant in VARIANTS:
        given = quantized if variant == "gptq" else None
        splice(base, upstream, base.with_name(variant), variant, quantized=given)
    assert hashes(base) == before
    return {variant: base.with_name(variant) for variant in VARIANTS}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param  # type: ignore[no-any-return]


def read_head(checkpoint: Path) -> dict[str, Tensor]:
    return {n: t for n, t in load_tensors(checkpoint).items() if n.startswith("mtp.")}


def test_the_bases_files_are_linked_as_they_are(
    base: Path, before: dict[str, str], spliced: dict[str, Path], variant: Variant
) -> None:
    assert set(hashes(spliced[variant])) == {*before, *WRITTEN}
    for source in base.iterdir():
        linked = os.path.samefile(source, spliced[variant] / source.name)
        assert linked == (source.name not in ("config.json", INDEX))


@pytest.mark.parametrize("why", ["asked for", "another file system"])
def test_copies_are_files_of_their_own(
    why: str, base: Path, upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if why != "asked for":
        monkeypatch.setattr(os, "link", refuse)
    splice(base, upstream, tmp_path / "out", "mxfp4", copy=why == "asked for")
    assert not os.path.samefile(base / SHARD, tmp_path / "out" / SHARD)
    assert hashes(tmp_path / "out")[SHARD] == hashes(base)[SHARD]


def test_a_base_of_symbolic_links_is_linked_through(
    base: Path, upstream: Path, tmp_path: Path
) -> None:
    """As in the hub's cache, whose snapshots are relative links to blobs."""
    snapshot = tmp_path / "cache" / "snapshot"
    snapshot.mkdir(parents=True)
    for source in base.iterdir():
        os.link(source, tmp_path / "cache" / source.name)
        (snapshot / source.name).symlink_to(Path("..") / source.name)
    out = tmp_path / "elsewhere" / "deep" / "out"
    splice(snapshot, upstream, out, "mxfp4")
    assert not (out / SHARD).is_symlink() and os.path.samefile(out / SHARD, base / SHARD)


def test_files_in_folders_of_the_base_come_along(
    base: Path, upstream: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "base", copy_function=os.link)
    for name in ("encoding/chat.py", ".cache/huggingface/lock"):
        (other / name).parent.mkdir(parents=True)
        (other / name).write_text("x")
    splice(other, upstream, tmp_path / "out", "mxfp4")
    assert os.path.samefile(other / "encoding/chat.py", tmp_path / "out" / "encoding/chat.py")
    assert not (tmp_path / "out" / ".cache").exists()


def test_index_is_the_union_and_its_total_size_true(
    base: Path, spliced: dict[str, Path], variant: Variant
) -> None:
    index, tensors = read_json(spliced[variant] / INDEX), load_tensors(spliced[variant])
    head = {name: HEAD_SHARD for name in tensors if name.startswith("mtp.")}
    assert index["weight_map"] == read_json(base / INDEX)["weight_map"] | head
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    assert index["metadata"] == {"note": "kept", "total_size": size}


def test_config_changes_where_the_head_needs_it(
    base: Path, spliced: dict[str, Path], variant: Variant
) -> None:
    old, new = read_json(base / "config.json"), read_json(spliced[variant] / "config.json")
    experts: Any = {"rtn": "int4", "gptq": "int4"}.get(variant, variant)
    added = add_head(old["quantization_config"], 4, experts, "base")
    assert new == {**old, "num_nextn_predict_layers": 1, "quantization_config": added}


def test_two_runs_give_the_same_bytes_and_count_them(
    base: Path, upstream: Path, quantized: Path, spliced: dict[str, Path], tmp_path: Path
) -> None:
    slower = shutil.copytree(quantized, tmp_path / "quantize")
    report = read_json(slower / "report.json")
    report |= {"seconds": {"gptq": 99}, "peak_host_bytes": 5}
    (slower / "report.json").write_text(json.dumps(report))
    result = splice(base, upstream, tmp_path / "again", "gptq", quantized=slower)
    assert hashes(tmp_path / "again") == hashes(spliced["gptq"])
    head = read_head(tmp_path / "again").values()
    written = sum(tensor.numel() * tensor.element_size() for tensor in head)
    assert (result.tensors, result.bytes_written) == (len(head), written)


def expert_values(head: dict[str, Tensor], stem: str, variant: Variant) -> Tensor:
    """Return what a spliced expert matrix stands for, float64, read by slow loops."""
    if variant == "bf16":
        return head[f"{stem}.weight"].double()
    packed, scale = head[f"{stem}.weight_packed"], head[f"{stem}.weight_scale"]
    return decode_mxfp4(packed, scale) if variant == "mxfp4" else decode_int4(packed, scale, 128)


def test_experts_are_upstreams_exactly_or_the_nearest_int4(
    spliced: dict[str, Path], upstream: Path, variant: Variant
) -> None:
    head, theirs = read_head(spliced[variant]), load_tensors(upstream)
    for stem in (f"mtp.0.ffn.experts.{name}" for name in ("0.w1", "31.w2", "63.w3")):
        exact = decode_mxfp4(theirs[f"{stem}.weight"], theirs[f"{stem}.scale"])
        values = expert_values(head, stem, variant)
        if variant in ("rtn", "gptq"):
            step = head[f"{stem}.weight_scale"].double().repeat_interleave(128, dim=1)
            # Half a step, and a little more at the end codes, where the scale was rounded.
            assert ((values - exact).abs() / step).max() <= 0.54
            assert not torch.equal(values, exact)
        else:
            assert torch.equal(values, exact)


def test_the_shard_is_what_safetensors_itself_would_write(
    spliced: dict[str, Path], variant: Variant, tmp_path: Path
) -> None:
    save_shard(read_head(spliced[variant]), tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == (spliced[variant] / HEAD_SHARD).read_bytes()


# What it refuses: (which folder, damage, message)


def keep_only(names: list[str]) -> Callable[[Path], None]:
    """Return what leaves a checkpoint with these tensors."""

    def change(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        write_checkpoint({name: torch.zeros(2) for name in names}, folder)

    return change


def set_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_tensors(folder)
        change(tensors)
        for path in folder.glob("*.safetensors"):
            path.unlink()
        write_checkpoint(tensors, folder)

    return rewrite


def set_json(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        content = read_json(folder / name)
        change(content)
        (folder / name).unlink()  # the base's is a link
        (folder / name).write_text(json.dumps(content))

    return rewrite


def set_last_shard(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[-1]
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(change(content))

    return rewrite


def group(config: Any) -> Any:
    return config["quantization_config"]["config_groups"]["group_1"]


EXPERT = "mtp.0.ffn.experts.5.w2"


@pytest.mark.parametrize(
    ("which", "damage", "message"),
    [
        ("base", set_last_shard(lambda b: b[:-1]), r"00003-of-00003.*: not a readable safetens"),
        ("base", set_json(INDEX, lambda i: i["weight_map"].pop("norm.weight")), r"list norm\.wei"),
        (
            "base",
            set_json("config.json", lambda c: c.update(moe_intermediate_size=512)),
            r"w1\.weight is \[256, 256\], expected \[512, 256\] by the",
        ),
        (
            "base",
            set_json("config.json", lambda c: c.update(n_routed_experts=128)),
            r"is \[64, 256\], expected \[128, 256\]",
        ),
        (
            "base",
            set_json("config.json", lambda c: group(c)["weights"].update(group_size=96)),
            r"experts\.\d+\.w\d: 256 inputs are no multiple of the group size 96",
        ),
        (
            "base",
            set_json("config.json", lambda c: group(c).update(targets=["re:.*rs.[0-3].*experts"])),
            r"model\.layers\.4\.ffn\.experts\.0\.w1 would load as plain",
        ),
        (
            "base",
            set_json("config.json", lambda c: c.pop("quantization_config")),
            r"base/config\.json: .*quantization_config",
        ),
        ("upstream", set_last_shard(lambda b: b[:8] + b"x" * 99), r"upstream/.*not a readable"),
        (
            "upstream",
            set_json(INDEX, lambda i: i["weight_map"].pop(f"{EXPERT}.scale")),
            rf"does not list {EXPERT}\.scale",
        ),
        (
            "upstream",
            set_tensors(lambda t: [t.pop(f"{EXPERT}.{part}") for part in ("weight", "scale")]),
            rf"{EXPERT}\.weight is none, expected \[256, 256\] .*\(1 of the",
        ),
        ("upstream", set_tensors(lambda t: t.pop(f"{EXPERT}.weight")), f"{EXPERT}: has scale; exp"),
        (
            "upstream",
            set_tensors(lambda t: t.update({"mtp.0.emb.weight": torch.zeros(2)})),
            r"mtp\.0\.emb\.weight is \[2\], expected none",
        ),
        (
            "upstream",
            set_tensors(lambda t: t.update({"mtp.0.hc_attn_fn": t["mtp.0.hc_attn_fn"].half()})),
            r"hc_attn_fn is torch\.float16, expected torch\.float32",
        ),
        (
            "upstream",
            set_tensors(lambda t: t.update({f"{EXPERT}.scale": t[f"{EXPERT}.scale"][:, :4]})),
            r"experts\.5\.w2: scale is \[256, 4\].*expected \[256, 8\]",
        ),
        ("upstream", keep_only(["layers.0.norm.weight"]), r"has no mtp\.\* tensors"),
        ("upstream", keep_only(["mtp.0.x", "mtp.1.x"]), r"has blocks mtp\.\{0,1\}.*DSpark"),
    ],
)
def test_broken_inputs_are_one_error_and_nothing_is_left(
    base: Path,
    upstream: Path,
    tmp_path: Path,
    which: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    shutil.copytree(base, tmp_path / "base", copy_function=os.link)
    shutil.copytree(upstream, tmp_path / "upstream")
    damage(tmp_path / which)
    with pytest.raises(GraftError, match=message):
        splice(tmp_path / "base", tmp_path / "upstream", tmp_path / "out", "rtn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "upstream"]


def test_a_base_that_has_a_head_is_refused(
    spliced: dict[str, Path], upstream: Path, tmp_path: Path
) -> None:
    with pytest.raises(GraftError, match=r"already has a head \(mtp\.0\."):
        splice(spliced["mxfp4"], upstream, tmp_path / "out")


def test_gptq_needs_the_experts_of_a_quantize_stage_with_the_bases_groups(
    base: Path, upstream: Path, quantized: Path, tmp_path: Path
) -> None:
    with pytest.raises(GraftError, match="run `mtp-graft quantize` first"):
        splice(base, upstream, tmp_path / "out", "gptq")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GraftError, match=r"report\.json: not found; .* run `mtp-graft quantize`"):
        splice(base, upstream, tmp_path / "out", "gptq", quantized=tmp_path / "empty")
    other = shutil.copytree(quantized, tmp_path / "quantize")
    path = sorted((other / "gptq").iterdir())[0]
    with shards.Shard(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.meta}
    name = "mtp.0.ffn.experts.3.w1.weight_scale"
    tensors[name] = tensors[name].repeat_interleave(2, dim=1)
    save_file(tensors, path)
    with pytest.raises(GraftError, match=r"experts\.3\.w1: scale is \[256, 4\].*group 128"):
        splice(base, upstream, tmp_path / "out", "gptq", quantized=other)
    path.unlink()
    with pytest.raises(GraftError, match=r"experts\.\d+\.w1\.weight_packed: not among"):
        splice(base, upstream, tmp_path / "out", "gptq", quantized=other)
    assert not (tmp_path / "out").exists()


def test_other_shards_of_the_upstream_need_not_be_there(
    base: Path, upstream: Path, spliced: dict[str, Path], tmp_path: Path
) -> None:
    other = shutil.copytree(upstream, tmp_path / "upstream")
    set_json(INDEX, lambda i: i["weight_map"].update({"layers.0.x": "not-fetched"}))(other)
    splice(base, other, tmp_path / "out", "mxfp4")
    written, whole = (f / HEAD_SHARD for f in (tmp_path / "out", spliced["mxfp4"]))
    assert written.read_bytes() == whole.read_bytes()


# Full disks, kills, and doing it again


def fill_disk(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_too_little_room_is_found_before_writing(
    base: Path, upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: Usage)
    with pytest.raises(GraftError, match=r"1,000 bytes free, [\d,]+ needed for model-mtp"):
        splice(base, upstream, tmp_path / "out", "bf16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("owner", "function", "message"),
    [
        (files.os, "fsync", r"model-mtp-w4a16\.safetensors: the disk is full"),
        (stage.os, "link", r"out: the disk is full"),
        (stage, "write_json", r"out: the disk is full"),
    ],
)
def test_a_full_disk_is_one_error_and_nothing_is_left(
    base: Path,
    before: dict[str, str],
    upstream: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    function: str,
    message: str,
) -> None:
    monkeypatch.setattr(owner, function, fill_disk)
    with pytest.raises(GraftError, match=message):
        splice(base, upstream, tmp_path / "out", "mxfp4")
    assert list(tmp_path.iterdir()) == []
    assert hashes(base) == before


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
    base: Path, before: dict[str, str], spliced: dict[str, Path], upstream: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
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
    assert hashes(out) == hashes(spliced["mxfp4"]) and hashes(base) == before


def test_a_splice_of_the_same_inputs_is_not_done_again_and_another_is_refused(
    base: Path, upstream: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    splice(base, upstream, out, "mxfp4")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert splice(base, upstream, out, "mxfp4").already_done
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(GraftError, match="already exists, and not from these inputs"):
        splice(base, upstream, out, "rtn")
    (out / HEAD_SHARD).write_bytes((out / HEAD_SHARD).read_bytes()[:-1])
    with pytest.raises(GraftError, match=r"model-mtp-w4a16\.safetensors: not a readable"):
        splice(base, upstream, out, "mxfp4")
