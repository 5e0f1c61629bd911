"""What a run needs before it begins: counted from the bundled model, whose sizes are known."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mtp_graft.dsv4.names import HEAD_PREFIX
from mtp_graft.errors import GraftError
from mtp_graft.pipeline import STAGES, device, find_bundled_recipe, plan, plan_run
from mtp_graft.pipeline.device import Gpu
from mtp_graft.pipeline.folder import RunFolder
from mtp_graft.pipeline.plan import (
    Need,
    Tensors,
    check_models,
    check_room,
    check_run,
    estimate_times,
)
from mtp_graft.recipe import Recipe, load_recipe
from mtp_graft.serving.memory import (
    RESERVE_BYTES,
    kv_cache_bytes,
    weights_bytes,
    weights_bytes_per_rank,
)
from mtp_graft.serving.topology import named_hardware
from mtp_graft.stages import hub
from mtp_graft.stages.fetch import Source, survey
from mtp_graft.stages.splice import HEAD_SHARD, splice
from serving.flash import flash

GB = 10**9


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(device, "gpu_names", lambda: ())
    return load_recipe(find_bundled_recipe(), ['bench.served_variants=["gptq", "bf16"]'])


@pytest.fixture
def sources(recipe: Recipe) -> tuple[Source, Source]:
    return survey(recipe.model)


@pytest.fixture
def tensors(recipe: Recipe, sources: tuple[Source, Source]) -> Tensors:
    return check_models(recipe, *sources)


@pytest.fixture
def folder(recipe: Recipe, tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", recipe)


Find = Any


@pytest.fixture
def find(
    recipe: Recipe,
    folder: RunFolder,
    sources: tuple[Source, Source],
    tensors: Tensors,
) -> Find:
    """Return a function that finds the needs of some stages; of one kind, if it is named."""

    def call(*stages: str, of: str | None = None, wanted: Recipe = recipe) -> list[Need]:
        needs = plan.find_needs(wanted, folder, stages or STAGES, sources, tensors)
        return [need for need in needs if of in (None, need.of)]

    return call


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def full_disk(free: int) -> Any:
    return lambda _path: Disk(10**15, 0, free)


def test_the_heads_take_what_splice_writes(
    find: Find, recipe: Recipe, tiny_model: Path, tmp_path: Path
) -> None:
    chosen = replace(recipe.splice, variant="mxfp4")
    bench = replace(recipe.bench, served_variants=("mxfp4", "bf16"))
    [need] = find("splice", wanted=replace(recipe, splice=chosen, bench=bench))
    written = 0
    for variant in bench.served_variants:
        out = tmp_path / variant
        splice(tiny_model / "base", tiny_model / "upstream", out, variant)
        written += (out / HEAD_SHARD).stat().st_size
    assert 0 <= written - need.bytes < 0.02 * written, "all but the shards' headers"


def test_residuals_are_counted_at_the_longest_that_prompts_may_be(
    find: Find, recipe: Recipe, tiny_model: Path
) -> None:
    config = json.loads((tiny_model / "base" / "config.json").read_text())
    [need] = find("capture", of="disk")
    capture = recipe.capture
    texts = capture.calibration_count + capture.evaluation_count
    tokens = texts * (capture.max_prompt_tokens + capture.new_tokens)
    assert need.bytes == tokens * config["hc_mult"] * config["hidden_size"] * 2


def test_only_the_stages_asked_for_and_not_yet_done_need_room(
    find: Find, folder: RunFolder
) -> None:
    assert find("fetch") == [], "folders need no download"
    assert {n.stage for n in find()} == {"capture", "quantize", "score", "splice", "bench"}
    folder.stage("capture").mkdir(parents=True)
    (folder.stage("capture") / "manifest.json").write_text("{}")
    assert find("capture") == []


def test_what_a_killed_run_has_written_is_not_needed_again(
    find: Find, folder: RunFolder, tmp_path: Path
) -> None:
    [before] = find("capture", of="disk")
    recordings = folder.stage("capture") / "recordings"
    recordings.mkdir(parents=True)
    (recordings / "000001.safetensors").write_bytes(bytes(1000))
    (tmp_path / "of the base").write_bytes(bytes(5000))
    (recordings / "linked").hardlink_to(tmp_path / "of the base")
    [after] = find("capture", of="disk")
    assert after.bytes == before.bytes - 1000


def test_a_copied_base_needs_its_size_for_every_head(
    find: Find, recipe: Recipe, sources: tuple[Source, Source]
) -> None:
    copying = replace(recipe, splice=replace(recipe.splice, copy=True))
    [linked], [copied] = find("splice"), find("splice", wanted=copying)
    assert copied.bytes - linked.bytes == 2 * sum(sources[0].sizes.values())


def test_a_small_disk_is_refused_before_anything_is_begun(
    recipe: Recipe, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", full_disk(1000))
    with pytest.raises(GraftError, match=r"disk of .*: 1,000 bytes free, .*capture: .*splice: "):
        check_run(recipe, folder, STAGES)
    assert not folder.path.exists()


def test_needs_of_one_disk_are_added_up(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = [Need(stage, "disk", str(tmp_path / stage), 600, "") for stage in ("fetch", "capture")]
    monkeypatch.setattr(shutil, "disk_usage", full_disk(1000))
    check_room(recipe, needs[:1])
    with pytest.raises(GraftError, match=r"1,000 bytes free, 1,200 needed \(fetch: 600, captur"):
        check_room(recipe, needs)


def test_too_little_memory_is_refused(recipe: Recipe) -> None:
    need = Need("score", "memory", "this machine", 10**18, "the head in float32")
    with pytest.raises(GraftError, match=r"memory of this machine: [\d,]+ bytes free, 1,000,000,0"):
        check_room(recipe, [need])


def test_on_a_cpu_the_served_model_takes_what_doctor_says(find: Find, tiny_model: Path) -> None:
    [need] = find("capture", of="memory")
    assert need.bytes == weights_bytes_per_rank(tiny_model / "base", 1, decoded=True)


@pytest.mark.parametrize(
    ("stage", "gpus", "free", "settings", "message"),
    [
        ("bench", 1, 100, (), "bench: 1 GPUs found, 2 asked for"),
        ("bench", 2, 99, (), None),
        # vLLM starts only if its share of the whole memory is free, whatever the model takes.
        ("bench", 2, 91, (), r"of each of 2 GPUs: 91,0.* free, 92,0.*vLLM takes 92%"),
        ("bench", 2, 91, ("--gpu-memory-utilization=0.9",), None),
        ("bench", 2, 91, ("--gpu-memory-utilization", "0.7"), r"70,0.* free, 80,0.*the model"),
        ("score", 1, 90, (), None),
        ("score", 1, 79, (), r"79,0.* free, 80,0.*score: the model"),
    ],
)
def test_gpus_are_refused_where_vllm_would_not_start(
    stage: str,
    gpus: int,
    free: int,
    settings: tuple[str, ...],
    message: str | None,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "hardware_for", lambda _: named_hardware("H200", gpus))
    monkeypatch.setattr(plan, "find_gpus", lambda: [Gpu("NVIDIA H200", free * GB, 100 * GB)] * gpus)
    serve = replace(recipe.serve, tensor_parallel_size=2, extra_args=settings)
    ranks = 2 if stage == "bench" else 1
    need = Need(stage, "GPU memory", f"{ranks} GPUs", ranks * 80 * GB, "the model")
    if message is None:
        check_room(replace(recipe, serve=serve), [need])
        return
    with pytest.raises(GraftError, match=message):
        check_room(replace(recipe, serve=serve), [need])


@pytest.mark.parametrize(
    ("gpu", "count", "fits"),
    [
        ("RTX PRO 6000 Max-Q", 1, False),
        ("RTX PRO 6000 Max-Q", 2, True),
        ("H100", 2, False),
        ("H100", 4, True),
        ("H200", 1, False),
        ("H200", 2, True),
        ("GB10", 1, False),
    ],
)
def test_the_real_model_is_refused_by_doctors_estimate(
    gpu: str,
    count: int,
    fits: bool,
    sources: tuple[Source, Source],
    folder: RunFolder,
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hardware, full_size = named_hardware(gpu, count), flash()
    memory = hardware.memory_bytes
    base = {n: t for n, t in full_size.tensors.items() if not n.startswith(HEAD_PREFIX)}
    monkeypatch.setattr(device, "gpu_names", lambda: (gpu,) * count)
    monkeypatch.setattr(plan, "hardware_for", lambda _: hardware)
    monkeypatch.setattr(plan, "find_gpus", lambda: [Gpu(gpu, memory, memory)] * count)
    settings = [f"serve.tensor_parallel_size={count}"]
    wanted = load_recipe(repo_root / "recipes" / "dsv4-flash.toml", settings)
    large = replace(sources[0], config=full_size.config)
    needs = plan.find_needs(wanted, folder, ["capture"], [large, sources[1]], base)
    need = next(need for need in needs if need.of == "GPU memory")
    cache = kv_cache_bytes(full_size.config, 4096, 2 * 4096)
    assert need.bytes == count * (weights_bytes(base, count) + RESERVE_BYTES + cache)
    if fits:
        check_room(wanted, [need])
        return
    with pytest.raises(GraftError, match=f"memory of each of {need.where}: "):
        check_room(wanted, [need])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": ...}, "has no 'hidden_size'; expected a DeepSeek-V4 config"),
        ({"sliding_window": 0}, "sliding_window is 0; expected a DeepSeek-V4"),
        ({"sliding_window": "many"}, "sliding_window is 'many'; expected a DeepSeek-V4"),
    ],
)
def test_a_config_of_another_model_is_refused(
    change: dict[str, Any], message: str, recipe: Recipe, sources: tuple[Source, Source]
) -> None:
    config = {k: v for k, v in (sources[0].config | change).items() if v is not ...}
    with pytest.raises(GraftError, match=message):
        check_models(recipe, replace(sources[0], config=config), sources[1])


@pytest.mark.parametrize(
    ("setting", "refusal"),
    [
        ("quantize.group_size=64", r"group_size is 64, expected 128 as in the experts of"),
        ("serve.tensor_parallel_size=3", r"tensor_parallel_size is 3, .* the 4 attention heads of"),
    ],
)
def test_a_recipe_that_does_not_fit_the_base_is_refused(
    setting: str, refusal: str, recipe: Recipe, tmp_path: Path
) -> None:
    asked = load_recipe(find_bundled_recipe(), [setting])
    with pytest.raises(GraftError, match=refusal):
        check_run(asked, RunFolder(tmp_path / "run", asked), STAGES)
    told = plan_run(asked, tmp_path / "run", STAGES)
    assert re.search(refusal, told["inputs"]) and told["needs"] is told["room"] is None


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
    assert {need["stage"] for need in told["needs"]} >= {"capture", "splice", "bench"}
    assert 20 < told["seconds"]["bench"]["seconds"] < 400
    assert "a demo" in told["seconds"]["bench"]["by"]
    assert not (tmp_path / "run").exists()


def test_a_large_base_is_estimated_by_acti_times(
    recipe: Recipe, sources: tuple[Source, Source]
) -> None:
    large = replace(sources[0], sizes={"model.safetensors": 143 * GB})
    times = estimate_times(recipe, [large, sources[1]])
    assert times["score"]["seconds"] is None and "never timed" in times["score"]["by"]
    assert "Acti card" in times["capture"]["by"]


def test_a_dry_run_says_why_it_knows_no_sizes(
    recipe: Recipe, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    gone = replace(recipe, model=replace(recipe.model, base="/nowhere"))
    real = load_recipe(repo_root / "recipes" / "dsv4-flash.toml")
    for asked, why in ((gone, "/nowhere: not a folder"), (real, "Name or service not known")):
        told = plan_run(asked, tmp_path / "run", STAGES)
        assert why in told["unknown"]
        assert told["sources"] is told["needs"] is told["seconds"] is None
    (tmp_path / "run").touch()
    with pytest.raises(GraftError, match=r"run: cannot be a run folder .*use another --run"):
        plan_run(recipe, tmp_path / "run", STAGES)


def test_a_run_folder_of_an_earlier_version_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    manifest = tmp_path / "run" / "capture" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    for version in ("0.2.0", "0.1.0"):
        manifest.write_text(json.dumps({"versions": {"mtp-graft": version}}))
        if version == "0.2.0":
            RunFolder(tmp_path / "run", recipe)
            continue
        with pytest.raises(GraftError, match=r"run: is a run folder of mtp-graft 0\.1\.0, expec"):
            plan_run(recipe, tmp_path / "run", STAGES)
