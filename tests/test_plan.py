"""What a run needs before it begins: counted from the bundled model, whose sizes are known."""

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from mtp_graft.checkpoint.shards import read_meta
from mtp_graft.dsv4.names import HEAD_PREFIX
from mtp_graft.errors import GraftError
from mtp_graft.pipeline import STAGES, find_bundled_recipe, plan
from mtp_graft.pipeline.folder import Run
from mtp_graft.pipeline.plan import Need, check_room, check_run, plan_run, read_models
from mtp_graft.pipeline.run import run_pipeline
from mtp_graft.recipe import Recipe, load_recipe
from mtp_graft.serving.memory import RESERVE_BYTES, kv_cache_bytes, weights_bytes
from mtp_graft.serving.topology import named_hardware
from mtp_graft.stages import fetch, parallel
from serving.bench_server import quiet
from serving.flash import flash


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(parallel, "gpus", lambda: None)
    return load_recipe(find_bundled_recipe())


@pytest.fixture
def free_disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    disk = SimpleNamespace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: disk)
    return disk


def test_needs_what_is_left(recipe: Recipe, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "base" / "config.json").read_text())
    models = read_models(recipe, *fetch.find_sources(recipe.model))

    def find(*stages: str) -> list[Need]:
        return plan.find_needs(Run(recipe, folder, stages or STAGES), models)

    assert find("fetch") == [], "folders need no download"
    assert {n.stage for n in find()} == {"capture", "quantize", "score", "splice", "bench"}
    before, memory = find("capture")
    capture = recipe.capture
    texts = capture.calibration_count + capture.evaluation_count
    tokens = texts * (capture.max_prompt_tokens + capture.new_tokens)
    assert before.bytes == tokens * config["hc_mult"] * config["hidden_size"] * 2
    tapped = Run(replace(recipe, capture=replace(capture, taps=(1, 3))), folder, ["capture"])
    with_taps, _ = plan.find_needs(tapped, models)
    assert with_taps.bytes == before.bytes * (config["hc_mult"] + 2) / config["hc_mult"]
    tapped = replace(tapped, recipe=replace(recipe, capture=replace(capture, taps=(1, 4))))
    with pytest.raises(GraftError, match=r"taps is \[1, 4\], expected layers below the base's 4"):
        plan.find_needs(tapped, models)
    assert memory.of == "memory", "on a CPU, as doctor estimates it"
    assert memory.bytes == weights_bytes(read_meta(tiny_model / "base"), 1, decoded=True)

    fewer = replace(recipe, capture=replace(capture, calibration_tokens=3000))
    needed, _ = plan.find_needs(Run(fewer, folder, ["capture"]), models)
    each = capture.max_prompt_tokens + capture.new_tokens
    assert needed.bytes * tokens == before.bytes * (3000 + (1 + capture.evaluation_count) * each)

    recordings = folder / "capture" / "recordings"
    recordings.mkdir(parents=True)
    (recordings / "000001.safetensors").write_bytes(bytes(1000))
    (tmp_path / "of the base").write_bytes(bytes(5000))
    (recordings / "linked").hardlink_to(tmp_path / "of the base")
    assert find("capture")[0].bytes == before.bytes - 1000
    (folder / "capture" / "manifest.json").write_text("{}")
    assert find("capture") == []


def test_too_small_is_refused(recipe: Recipe, folder: Path, tmp_path: Path, free_disk: Any) -> None:
    free_disk.free = 1000
    with pytest.raises(GraftError, match=r"disk of .*: 1,000 bytes free, .*capture: .*splice: "):
        check_run(Run(recipe, folder))
    assert not folder.exists()

    def of(kind: Any, stage: str, size: int) -> Need:
        return Need(stage, kind, str(tmp_path / stage), size, 1000, "what it keeps")

    check_room([of("disk", "fetch", 600)])
    with pytest.raises(GraftError, match=r"1,000 bytes free, 1,200 needed \(fetch: 600 .*captur"):
        check_room([of("disk", "fetch", 600), of("disk", "capture", 600)])  # one disk has both
    check_room([of("memory", "score", 600), of("memory", "bench", 600)])  # one after the other
    with pytest.raises(GraftError, match=r"memory of .*score: 1,000 bytes free, 1,001 needed"):
        check_room([of("memory", "score", 1001)])


@pytest.mark.parametrize(
    ("gpu", "found", "asked", "message"),
    [
        ("RTX PRO 6000 Max-Q", 2, 1, "GPU memory of 1x RTX PRO 6000 Max-Q: "),
        ("RTX PRO 6000 Max-Q", 2, 2, None),
        ("RTX PRO 6000 Max-Q", 1, 2, "capture: 1 GPUs found, 2 asked for"),
        ("H100", 2, 2, "GPU memory of 2x H100: "),
    ],
)
def test_the_real_model_is_judged_by_doctors_estimate(
    gpu: str, found: int, asked: int, message: Any, recipe: Recipe, folder: Path, repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    full_size = flash()
    for module in (parallel, plan):
        monkeypatch.setattr(module, "gpus", lambda: named_hardware(gpu, found))
    settings = [f"serve.tensor_parallel_size={asked}"]
    wanted = load_recipe(repo_root / "recipes" / "dsv4-flash.toml", settings)
    base = {n: t for n, t in full_size.tensors.items() if not n.startswith(HEAD_PREFIX)}
    models = read_models(recipe, *fetch.find_sources(recipe.model))
    large = replace(models, base=replace(models.base, config=full_size.config), tensors=base)
    cache = kv_cache_bytes(full_size.config, 4096, 2 * 4096)
    with pytest.raises(GraftError, match=message) if message else nullcontext():
        needs = plan.find_needs(Run(wanted, folder, ["capture"]), large)
        [need] = [need for need in needs if need.of == "GPU memory"]
        check_room([need])
        assert need.bytes == asked * (weights_bytes(base, asked) + RESERVE_BYTES + cache)


def test_a_recipe_that_does_not_fit_the_base_is_refused(recipe: Recipe, folder: Path) -> None:
    for setting, refusal in (
        ("quantize.group_size=64", r"group_size is 64, expected 128 as in the experts of"),
        ("serve.tensor_parallel_size=3", r"tensor_parallel_size is 3, .* num_attention_heads.* of"),
    ):
        asked = load_recipe(find_bundled_recipe(), [setting])
        with pytest.raises(GraftError, match=refusal):
            check_run(Run(asked, folder))
        told = plan_run(asked, folder, STAGES)
        assert re.search(refusal, told["inputs"]) and told["needs"] is told["room"] is None


def test_a_run_folder_in_a_checkpoint_is_refused_before_it_is_made(tmp_path: Path) -> None:
    asked = load_recipe(find_bundled_recipe(), [f'model.base="{tmp_path}"'])
    with pytest.raises(GraftError, match=rf"run: is in {tmp_path}; choose"):
        run_pipeline(asked, tmp_path / "run", quiet)
    assert [*tmp_path.iterdir()] == []


def test_dry_run_tells_all(recipe: Recipe, folder: Path, tiny_model: Path, free_disk: Any) -> None:
    told = plan_run(recipe, folder, STAGES)
    files = [p for p in (tiny_model / "base").iterdir() if p.suffix in (".safetensors", ".json")]
    assert told["sources"]["base"]["files"] == {p.name: p.stat().st_size for p in files}
    assert told["sources"]["base"]["bytes_to_download"] == 0
    assert (told["inputs"], told["room"], told["unknown"]) == ("fit", "enough", None)
    assert {need["stage"] for need in told["needs"]} >= {"capture", "splice", "bench"}
    assert 20 < told["seconds"]["bench"]["seconds"] < 400
    assert "a demo" in told["seconds"]["bench"]["by"]
    assert not folder.exists()
    copy = shutil.copy(recipe.capture.evaluation_prompts, folder.parent)
    asked = load_recipe(find_bundled_recipe(), [f"capture.calibration_prompts={copy}"])
    assert "48 of its prompts are in" in plan_run(asked, folder, STAGES)["inputs"]
    base, upstream = fetch.find_sources(recipe.model)
    large = replace(base, sizes={"model.safetensors": 143 * 10**9})
    times = plan.estimate_times(recipe, [large, upstream])
    assert "score" not in times, "which was never timed at this size"
    assert "Acti card" in times["capture"]["by"]


def test_what_healing_needs_is_told(repo_root: Path, folder: Path, recipe: Recipe) -> None:
    """By the recipe's measured step, of 3.2 GB, and time, of 138 s."""
    path = repo_root / "recipes" / "tiny-heal.toml"
    told = plan_run(load_recipe(path), folder, STAGES)
    disk, memory = (need["bytes"] for need in told["needs"] if need["stage"] == "heal")
    assert disk > 2e7 and memory == pytest.approx(3.2e9, rel=0.1)
    assert told["seconds"]["heal"]["seconds"] == pytest.approx(138, rel=0.01)
    told = plan_run(load_recipe(path, ["heal.batch_tokens=1000000000"]), folder, STAGES)
    assert re.search(r"memory of .*needed \(heal: ", told["room"])


def test_unknown_if_offline(repo_root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = Mock(side_effect=ConnectionError("Name or service not known"))
    monkeypatch.setattr(fetch.hub, "snapshot_download", unreachable)
    real = load_recipe(repo_root / "recipes" / "dsv4-flash.toml")
    told = plan_run(real, folder, STAGES)
    assert "Name or service not known" in told["unknown"]
    assert told["sources"] is told["needs"] is told["seconds"] is None
    folder.touch()
    with pytest.raises(GraftError, match=r"run: cannot be a run folder .*use another --run"):
        plan_run(real, folder, STAGES)
