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
from safetensors.torch import load_file
from torch import Tensor

from mtp_graft.checkpoint import files
from mtp_graft.checkpoint.quant_manifest import (
    HEAD_SHARD,
    MANIFEST_NAME,
    MANIFEST_TEXT_NAME,
    RECIPE_NAME,
)
from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.checkpoint.shards import INDEX_NAME, load_tensors
from mtp_graft.errors import GraftError
from mtp_graft.recipe import ALL_VARIANTS as VARIANTS
from mtp_graft.recipe import Variant
from mtp_graft.stages import splice as stage
from mtp_graft.stages.splice import splice
from quantized import write_checkpoint

WRITTEN = {HEAD_SHARD, MANIFEST_NAME, MANIFEST_TEXT_NAME, RECIPE_NAME}
SHARD = "model-00001-of-00003.safetensors"
EXPERT = "mtp.0.ffn.experts.5.w2"
Damage = Callable[[Path], object]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A base of links that may be changed; with files in folders, and one that is hidden."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base", copy_function=os.link))
    for name in ("encoding/chat.py", ".cache/huggingface/lock"):
        (base / name).parent.mkdir(parents=True)
        (base / name).write_text("x")
    set_json(INDEX_NAME, lambda index: index.update(metadata={"note": "kept", "total_size": 5}))(
        base
    )
    return base


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_is_the_linked_base_a_head_and_files_that_list_both(
    tiny_base: Path, spliced: dict[str, Path], variant: Variant
) -> None:
    out = spliced[variant]
    assert {p.name for p in out.iterdir()} == {p.name for p in tiny_base.iterdir()} | WRITTEN
    for source in tiny_base.iterdir():
        linked = os.path.samefile(source, out / source.name)
        assert linked == (source.name not in ("config.json", INDEX_NAME))
    tensors, index = load_tensors(out), read_json(out / INDEX_NAME)
    head = {name: HEAD_SHARD for name in tensors if name.startswith("mtp.")}
    assert index["weight_map"] == read_json(tiny_base / INDEX_NAME)["weight_map"] | head
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    assert index["metadata"]["total_size"] == size
    old, new = read_json(tiny_base / "config.json"), read_json(out / "config.json")
    experts: Any = {"rtn": "int4", "gptq": "int4"}.get(variant, variant)
    added = add_head(old["quantization_config"], 4, experts, "base")
    assert new == {**old, "num_nextn_predict_layers": 1, "quantization_config": added}


@pytest.mark.parametrize("how", ["linked", "copied", "another file system", "symbolic links"])
def test_files_come_along_as_links_or_copies(
    how: str, base: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    given, out = base, tmp_path / "elsewhere" / "deep" / "out"
    if how == "another file system":
        monkeypatch.setattr(os, "link", refuse)
    if how == "symbolic links":  # as in the hub's cache, whose snapshots are links to blobs
        given = tmp_path / "snapshot"
        for source in (path for path in base.rglob("*") if path.is_file()):
            link = given / source.relative_to(base)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(source, link.parent))
    splice(given, tiny_model / "upstream", out, copy=how == "copied")
    for name in (SHARD, "encoding/chat.py"):
        assert not (out / name).is_symlink()
        linked = os.path.samefile(base / name, out / name)
        assert linked == (how in ("linked", "symbolic links"))
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not (out / ".cache").exists()
    assert read_json(out / INDEX_NAME)["metadata"]["note"] == "kept"


def test_the_same_inputs_give_the_same_bytes_and_others_are_refused(
    tiny_base: Path, tiny_model: Path, quantized: Path, spliced: dict[str, Path], tmp_path: Path
) -> None:
    slower, out = shutil.copytree(quantized, tmp_path / "quantize"), tmp_path / "out"
    report = read_json(slower / "report.json") | {"seconds": {"gptq": 99}, "peak_host_bytes": 5}
    (slower / "report.json").write_text(json.dumps(report))
    upstream = shutil.copytree(tiny_model / "upstream", tmp_path / "upstream")
    other_shard = set_json(INDEX_NAME, lambda i: i["weight_map"].update({"layers.0.x": "none"}))
    other_shard(upstream)  # of the master, and not fetched

    plan = splice(tiny_base, upstream, out, "gptq", quantized=slower)
    assert hashes(out) == hashes(spliced["gptq"])
    written = sum(t.numel() * t.element_size() for t in load_file(out / HEAD_SHARD).values())
    assert plan.bytes == written
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    splice(tiny_base, upstream, out, "gptq", quantized=quantized)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(GraftError, match="already exists, and not from these inputs"):
        splice(tiny_base, upstream, out, "rtn")
    (out / HEAD_SHARD).write_bytes((out / HEAD_SHARD).read_bytes()[:-1])
    with pytest.raises(GraftError, match=r"model-mtp-w4a16\.safetensors: not a readable"):
        splice(tiny_base, upstream, out, "gptq", quantized=quantized)


# What it refuses: (which folder, damage, message)


def set_json(name: str, change: Callable[[Any], object]) -> Damage:
    def rewrite(folder: Path) -> None:
        content = read_json(folder / name)
        change(content)
        (folder / name).unlink()  # it may be a link
        (folder / name).write_text(json.dumps(content))

    return rewrite


def set_config(**values: Any) -> Damage:
    return set_json("config.json", lambda config: config.update(values))


def lose_the_heads_experts(config: Any) -> None:
    group = config["quantization_config"]["config_groups"]["group_1"]
    group["targets"] = ["re:.*rs.[0-3].*experts"]


def set_tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def rewrite(folder: Path) -> None:
        tensors = load_tensors(folder)
        change(tensors)
        for path in folder.glob("*.safetensors"):
            path.unlink()
        write_checkpoint(tensors, folder)

    return rewrite


def set_last_shard(change: Callable[[bytes], bytes]) -> Damage:
    def rewrite(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[-1]
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(change(content))

    return rewrite


@pytest.mark.parametrize(
    ("which", "damage", "message"),
    [
        ("base", set_last_shard(lambda b: b[:-1]), r"00003-of-00003.*: not a readable safetens"),
        ("base", set_json(INDEX_NAME, lambda i: i["weight_map"].pop("norm.weight")), r"norm\.wei"),
        (
            "base",
            set_config(moe_intermediate_size=512),
            r"w1\.weight is \[256, 256\], expected \[5",
        ),
        ("base", set_config(quantization_config=None), r"base/config\.json: .*quantization_config"),
        ("base", set_json("config.json", lose_the_heads_experts), r"4\.ffn.* load as plain"),
        ("upstream", set_last_shard(lambda b: b[:8] + b"x" * 99), r"upstream/.*not a readable"),
        (
            "upstream",
            set_json(INDEX_NAME, lambda i: i["weight_map"].pop(f"{EXPERT}.scale")),
            rf"does not list {EXPERT}\.scale",
        ),
        (
            "upstream",
            set_tensors(lambda t: [t.pop(f"{EXPERT}.{part}") for part in ("weight", "scale")]),
            rf"{EXPERT}\.weight is none, expected \[256, 256\] .*\(1 of the",
        ),
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
    ],
)
def test_broken_inputs_are_one_error_and_nothing_is_left(
    base: Path, tiny_model: Path, tmp_path: Path, which: str, damage: Damage, message: str
) -> None:
    shutil.copytree(tiny_model / "upstream", tmp_path / "upstream")
    damage(tmp_path / which)
    with pytest.raises(GraftError, match=message):
        splice(base, tmp_path / "upstream", tmp_path / "out", "rtn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "upstream"]


def test_gptq_needs_a_finished_quantize_stage(
    tiny_base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def refused(folder: Path | None, message: str) -> None:
        with pytest.raises(GraftError, match=message):
            splice(tiny_base, tiny_model / "upstream", tmp_path / "out", "gptq", quantized=folder)

    refused(None, "run `mtp-graft quantize` first")
    refused(tmp_path, r"report\.json: not found; .* run `mtp-graft quantize`")
    assert not (tmp_path / "out").exists()


# Full disks and kills


def fill_disk(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "function", "message"),
    [
        (files.os, "fsync", r"model-mtp-w4a16\.safetensors: the disk is full"),
        (stage.os, "link", r"out: the disk is full"),
        (stage, "write_json", r"out: the disk is full"),
    ],
)
def test_a_full_disk_is_one_error_and_nothing_is_left(
    tiny_base: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    owner: object, function: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(owner, function, fill_disk)
    with pytest.raises(GraftError, match=message):
        splice(tiny_base, tiny_model / "upstream", tmp_path / "out", "mxfp4")
    assert list(tmp_path.iterdir()) == []


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
    tiny_base: Path, spliced: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    out, upstream, before = tmp_path / "out", tiny_model / "upstream", hashes(tiny_base)
    command = [sys.executable, "-c", SLOW_SPLICE, *map(str, (tiny_base, upstream, out))]
    with subprocess.Popen(command) as process:
        while not list(tmp_path.glob(f".out.tmp/*{HEAD_SHARD}*")):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.tmp"]
    splice(tiny_base, upstream, out, "mxfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert hashes(out) == hashes(spliced["mxfp4"]) and hashes(tiny_base) == before
