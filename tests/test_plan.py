"""What a run needs before it begins: counted from the bundled model, whose sizes are known."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mtp_graft.checkpoint.shards import read_index, read_meta
from mtp_graft.errors import GraftError
from mtp_graft.pipeline import device, find_bundled_recipe, plan, plan_run
from mtp_graft.pipeline.folder import RunFolder
from mtp_graft.pipeline.plan import Need, check_room, find_needs
from mtp_graft.pipeline.run import STAGES, check_run
from mtp_graft.pipeline.times import estimate_times
from mtp_graft.pipeline.weights import base_tensors, head_tensors
from mtp_graft.recipe import Linears, Recipe, Variant, load_recipe
from mtp_graft.serving.doctor import examine
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.doctor.target import find_target
from mtp_graft.serving.memory import (
    RESERVE_BYTES,
    UTILIZATION,
    kv_cache_bytes,
    weights_bytes,
    weights_bytes_per_rank,
)
from mtp_graft.stages import hub
from mtp_graft.stages.fetch import Source, survey
from mtp_graft.stages.splice import splice
from serving.flash import flash

GB = 10**9


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(device, "gpu_names", lambda: ())
    return load_recipe(find_bundled_recipe())


@pytest.fixture
def sources(recipe: Recipe) -> tuple[Source, Source]:
    return survey(recipe.model)


@pytest.fixture
def folder(recipe: Recipe, tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", recipe)


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def full_disk(free: int) -> Any:
    return lambda _path: Disk(10**15, 0, free)


def test_the_heads_sizes_are_bounds_of_what_splice_writes(
    recipe: Recipe, sources: tuple[Source, Source], folder: RunFolder, tiny_model: Path
) -> None:
    """The stored sizes are those of `benchmarks/results/demo_cpu.json`'s run."""
    head = plan._count_head(sources[0])
    for variant, stored in {"rtn": 8_019_304, "mxfp4": 8_212_840, "bf16": 26_693_992}.items():
        assert stored < head.bytes_as(variant) < 1.25 * stored
    spliced = next(n for n in find_needs(recipe, folder, STAGES, sources) if n.stage == "splice")
    assert spliced.bytes == sum(head.bytes_as(v) for v in recipe.served_variants)


def test_residuals_are_counted_at_the_longest_that_prompts_may_be(
    recipe: Recipe, sources: tuple[Source, Source], folder: RunFolder, tiny_model: Path
) -> None:
    config = json.loads((tiny_model / "base" / "config.json").read_text())
    captured = next(n for n in find_needs(recipe, folder, ["capture"], sources) if n.of == "disk")
    rows = (96 + 144) * (512 + 96)
    assert captured.bytes == rows * config["hc_mult"] * config["hidden_size"] * 2


def test_only_the_stages_asked_for_and_not_yet_done_need_room(
    recipe: Recipe, sources: tuple[Source, Source], folder: RunFolder
) -> None:
    assert find_needs(recipe, folder, ["fetch"], sources) == [], "folders need no download"
    assert {n.stage for n in find_needs(recipe, folder, STAGES, sources)} == {
        *("capture", "quantize", "score", "splice", "bench")
    }
    folder.stage("capture").mkdir(parents=True)
    (folder.stage("capture") / "manifest.json").touch()
    assert find_needs(recipe, folder, ["capture"], sources) == []


def test_what_a_killed_run_has_written_is_not_needed_again(
    recipe: Recipe, sources: tuple[Source, Source], folder: RunFolder, tmp_path: Path
) -> None:
    def needed() -> int:
        return next(n for n in find_needs(recipe, folder, STAGES, sources) if n.of == "disk").bytes

    before = needed()
    recordings = folder.stage("capture") / "recordings"
    recordings.mkdir(parents=True)
    (recordings / "000001.safetensors").write_bytes(bytes(1000))
    (tmp_path / "of the base").write_bytes(bytes(5000))
    (recordings / "linked").hardlink_to(tmp_path / "of the base")
    assert needed() == before - 1000


def test_a_copied_base_needs_its_size_for_every_head(
    recipe: Recipe, sources: tuple[Source, Source], folder: RunFolder
) -> None:
    copying = replace(recipe, splice=replace(recipe.splice, copy=True))
    needs = [n for n in find_needs(copying, folder, ["splice"], sources)]
    assert [n.what_for for n in needs] == ["2 heads; the base is linked", "copies of the base"]
    assert needs[1].bytes == 2 * sum(sources[0].sizes.values())


def test_a_small_disk_is_refused_with_what_is_needed_and_free(
    recipe: Recipe, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", full_disk(1000))
    with pytest.raises(GraftError) as raised:
        check_run(recipe, folder, STAGES)
    message = str(raised.value)
    assert f"disk of {folder.path}: 1,000 bytes free, " in message
    assert "capture: 298," in message and "splice: " in message
    assert not folder.path.exists(), "nothing was begun"


def test_needs_of_one_disk_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [Need(stage, "disk", 600, "", tmp_path / stage) for stage in ("fetch", "capture")]
    monkeypatch.setattr(shutil, "disk_usage", full_disk(1000))
    check_room(needs[:1])
    with pytest.raises(GraftError, match=r"1,000 bytes free, 1,200 needed \(fetch: 600, captur"):
        check_room(needs)


def test_too_little_memory_is_refused() -> None:
    need = Need("score", "memory", 10**18, "the head in float32")
    with pytest.raises(GraftError, match=r"memory of this machine: [\d,]+ bytes free, 1,000,000,0"):
        check_room([need])


@pytest.mark.parametrize(
    ("gpus", "free", "message"),
    [
        (1, 200 * GB, "bench: 1 GPUs found, 2 asked for"),
        (2, 50 * GB, r"GPU memory of 2 GPUs: 100,000,000,000 bytes free, 160,000,000,000 needed"),
        (2, 90 * GB, None),
    ],
)
def test_the_gpus_are_looked_at_before_the_model_is_served(
    gpus: int, free: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "free_gpu_memory", lambda: [free] * gpus)
    need = Need("bench", "GPU memory", 160 * GB, "the served model", num_gpus=2)
    if message is None:
        check_room([need])
        return
    with pytest.raises(GraftError, match=message):
        check_room([need])


def tensor_list(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, list[int]]]:
    return {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}


def test_tensors_are_known_from_the_config_as_the_bundled_base_has_them(
    sources: tuple[Source, Source], tiny_model: Path
) -> None:
    base = tiny_model / "base"
    stored = tensor_list(read_meta(base, read_index(base)))
    assert tensor_list(base_tensors(sources[0].config, 128)) == stored


@pytest.mark.parametrize(
    ("variant", "linears"), [("rtn", "base"), ("mxfp4", "fp8"), ("bf16", "bf16")]
)
def test_tensors_are_known_from_the_config_as_splice_writes_the_head(
    variant: Variant,
    linears: Linears,
    sources: tuple[Source, Source],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    spliced = tmp_path / "spliced"
    splice(tiny_model / "base", tiny_model / "upstream", spliced, variant, linears=linears)
    stored = tensor_list(read_meta(spliced, read_index(spliced, "mtp.")))
    assert tensor_list(head_tensors(sources[0].config, variant, linears, 128)) == stored


def test_on_a_cpu_the_served_model_takes_what_doctor_says(
    recipe: Recipe, sources: tuple[Source, Source], folder: RunFolder, tiny_model: Path
) -> None:
    (need,) = (n for n in find_needs(recipe, folder, ["capture"], sources) if n.of == "memory")
    assert need.bytes == weights_bytes_per_rank(tiny_model / "base", 1, decoded=True)
    assert need.bytes > 4 * sum(sources[0].sizes.values()), "experts become float32"


@pytest.fixture(scope="module")
def full_size() -> Checkpoint:
    return flash()


@pytest.mark.parametrize(
    ("gpu", "count", "fits"),
    [
        ("RTX PRO 6000 Max-Q", 1, False),
        ("RTX PRO 6000 Max-Q", 2, True),
        ("H100", 2, False),
        ("H100", 4, True),
        ("H200", 1, False),
        ("H200", 2, True),
        ("H200", 8, True),
    ],
)
def test_on_gpus_a_run_is_refused_where_doctor_finds_an_error(
    gpu: str,
    count: int,
    fits: bool,
    full_size: Checkpoint,
    sources: tuple[Source, Source],
    folder: RunFolder,
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = find_target(gpu, count, max_model_len=4096)
    assert target.hardware is not None
    free = target.hardware.memory_bytes
    monkeypatch.setattr(device, "gpu_names", lambda: (gpu,) * count)
    monkeypatch.setattr(plan, "free_gpu_memory", lambda: [free] * count)
    settings = [f"serve.tensor_parallel_size={count}"]
    wanted = load_recipe(repo_root / "recipes" / "dsv4-flash.toml", settings)
    large = replace(sources[0], config=full_size.config)
    (need,) = find_needs(wanted, folder, ["bench"], [large, sources[1]])
    weights = weights_bytes(full_size.tensors, count)
    cache = kv_cache_bytes(full_size.config, 4096, 2 * 4096)
    assert need.bytes == count * math.ceil((weights + RESERVE_BYTES + cache) / UTILIZATION)
    errors = {f.id for f in examine(full_size, target) if f.severity == "error"}
    assert errors == (set() if fits else {"memory-weights"})
    if fits:
        check_room([need])
        return
    with pytest.raises(GraftError, match=f"GPU memory of {need.where}: "):
        check_room([need])


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size"])
def test_a_config_of_another_model_is_refused(
    key: str, recipe: Recipe, sources: tuple[Source, Source], folder: RunFolder
) -> None:
    config = {name: value for name, value in sources[0].config.items() if name != key}
    other = replace(sources[0], config=config)
    with pytest.raises(GraftError, match=f"has no '{key}'; expected a DeepSeek-V4 config"):
        find_needs(recipe, folder, STAGES, [other, sources[1]])


@pytest.mark.parametrize("value", [None, 0, "many"])
def test_a_dimension_that_is_no_number_is_refused(
    value: object, recipe: Recipe, sources: tuple[Source, Source], folder: RunFolder
) -> None:
    other = replace(sources[0], config={**sources[0].config, "sliding_window": value})
    with pytest.raises(GraftError, match=f"sliding_window is {value!r}; expected a DeepSeek-V4"):
        find_needs(recipe, folder, STAGES, [other, sources[1]])


def test_a_dry_run_refuses_a_file_as_its_run_folder(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(GraftError, match=r"run: cannot be a run folder .*use another --run"):
        plan_run(recipe, tmp_path / "run", STAGES)


def test_a_dry_run_tells_files_sizes_and_times_and_by_what(
    recipe: Recipe, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", full_disk(10**12))  # whatever is free here
    told = plan_run(recipe, tmp_path / "run", STAGES)
    base = tiny_model / "base"
    assert told["sources"]["base"]["files"] == {
        path.name: path.stat().st_size
        for path in base.iterdir()
        if path.suffix in (".safetensors", ".json")
    }
    assert told["sources"]["base"]["bytes_to_download"] == 0
    assert (told["inputs"], told["room"], told["unknown"]) == ("fit", "enough", None)
    assert 50 < told["seconds"]["bench"]["seconds"] < 400
    assert "a demo" in told["seconds"]["bench"]["by"]
    assert not (tmp_path / "run").exists()


def test_a_large_base_is_estimated_by_acti_times(
    recipe: Recipe, sources: tuple[Source, Source]
) -> None:
    large = replace(sources[0], sizes={"model.safetensors": 143 * GB})
    times = estimate_times(recipe, [large, sources[1]])
    assert times["score"].seconds is None and "never timed" in times["score"].by
    assert "Acti card" in times["capture"].by


@pytest.mark.parametrize(
    ("setting", "refusal"),
    [
        (
            "quantize.group_size=64",
            r"quantize\.group_size is 64, expected 128 as in the experts of",
        ),
        ("serve.tensor_parallel_size=3", r"tensor_parallel_size is 3, .* the 4 attention heads of"),
    ],
)
def test_a_recipe_that_does_not_fit_the_base_is_refused(
    setting: str, refusal: str, recipe: Recipe, tmp_path: Path
) -> None:
    asked = load_recipe(find_bundled_recipe(), [setting])
    with pytest.raises(GraftError, match=refusal):
        check_run(asked, RunFolder(tmp_path / "run", asked), STAGES)
    assert re.search(refusal, plan_run(asked, tmp_path / "run", STAGES)["inputs"])


def test_a_dry_run_without_the_checkpoints_says_why_it_knows_no_sizes(
    recipe: Recipe, tmp_path: Path
) -> None:
    gone = replace(recipe, model=replace(recipe.model, base="/nowhere"))
    told = plan_run(gone, tmp_path / "run", STAGES)
    assert told["unknown"] == "/nowhere: not a folder; expected a checkpoint or a hub id owner/name"
    assert told["sources"] is told["needs"] is told["seconds"] is None


def test_a_dry_run_without_the_hub_tells_what_is_known_of_the_real_models(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    real = load_recipe(repo_root / "recipes" / "dsv4-flash.toml")
    told = plan_run(real, tmp_path / "run", STAGES)
    assert "cannot be fetched from the hub (Name or service not known)" in told["unknown"]
    base, upstream = told["known"]
    assert base.startswith(f"{real.model.base}: 4 shards, about 143 GiB (Acti card")
    assert upstream.startswith(f"{real.model.upstream}: the head is in one shard of 46")
    other = replace(real, model=replace(real.model, base="some/base", upstream="some/master"))
    assert plan_run(other, tmp_path / "run", STAGES)["known"] == []
