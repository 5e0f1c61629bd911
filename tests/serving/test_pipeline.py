"""The pipeline's orchestration: real capture and serving of a stand-in, the other stages faked."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any
from unittest.mock import Mock

import pytest

from mtp_graft import pipeline
from mtp_graft.errors import GraftError
from mtp_graft.pipeline import STAGES, Stage
from mtp_graft.pipeline.folder import locked
from mtp_graft.pipeline.run import run_pipeline, run_stage
from mtp_graft.recipe import load_recipe
from mtp_graft.serving import server
from mtp_graft.serving.client import COUNT_DRAFTS, ServerClient
from mtp_graft.serving.command import ServeOptions
from mtp_graft.stages.splice import HEAD_SHARD
from quantized import read_json as read
from run_folder import HEAL, StandIns, write_rows

from .bench_server import quiet
from .conftest import HEAD_TENSORS, install, install_gpus, only_from, write_checkpoint

RECIPE = """
model = {name = "tiny-mtp", base = "./base", upstream = "./upstream"}
bench = {prompts="bench.jsonl", count=2, max_tokens=8, rounds=1, served_variants=["rtn", "gptq"]}
serve.extra_args = ["--seed", "7"]
[capture]
calibration_prompts = "prompts.jsonl"
calibration_count = 3
evaluation_prompts = "prompts.jsonl"
evaluation_count = 2
"""
LIMITS = "max_prompt_tokens = 8\nnew_tokens = 6\nconcurrency = 1\nmax_model_len = 64\n"
#: Whose servers are started; the first one records.
CAPTURE, BASE, GPTQ, RTN = "capture", "base", "gptq", "rtn"
MEASURED = ("capture", "quantize", "score", "splice", "verify", "bench")  # all but the report


def write_prompts(path: Path, prefix: str, lengths: Sequence[int]) -> None:
    rows = [{"id": f"{prefix}{n}", "text": f"{n}{prefix * (m - 1)}"} for n, m in enumerate(lengths)]
    write_rows(path, *rows)


@pytest.fixture
def recipe(tmp_path: Path, base: Path) -> Path:
    write_checkpoint(tmp_path / "upstream", HEAD_TENSORS)
    write_prompts(tmp_path / "prompts.jsonl", "p", range(1, 7))
    write_prompts(tmp_path / "bench.jsonl", "b", range(1, 3))
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE + LIMITS)
    return file


@pytest.fixture
def stages(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    stand_ins = StandIns()
    monkeypatch.setattr(pipeline.run, "check_run", lambda *_: None)
    for name in ("quantize", "score", "verify"):
        monkeypatch.setattr(f"mtp_graft.stages.{name}.{name}", getattr(stand_ins, name))
    for name in ("splice", "run_in_process"):
        monkeypatch.setattr(pipeline.run, name, getattr(stand_ins, name))
    return stand_ins


@dataclass
class Servers:
    """Which servers were started, in order; how they behave can be set for each.

    On a CPU capture's server measures the base as well; on GPUs the base has one of its own.
    """

    options: dict[str, ServeOptions] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


@pytest.fixture
def servers(fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Servers:
    servers, running = Servers(), Lock()

    @contextmanager
    def managed(options: ServeOptions, log: Path, *rest: Any) -> Iterator[ServerClient]:
        name = log.stem.removeprefix("vllm-")
        fake(**servers.settings.get(name, {}))
        servers.started.append(name)
        servers.options[name] = options
        assert running.acquire(blocking=False), "two servers share the machine"
        try:
            with server.managed_server(options, log, *rest) as client:
                yield client
        finally:
            running.release()

    monkeypatch.setattr(pipeline.bench, "managed_server", managed)
    return servers


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(recipe: Path, folder: Path, stages: StandIns, servers: Servers) -> Run:
    """Run the recipe's stages; forget first what earlier calls started and did."""

    def call(*overrides: str, only: Stage | None = None, start: Stage | None = None) -> Any:
        stages.done.clear()
        servers.started.clear()
        chosen = MEASURED  # charts take seconds, and one test looks at them
        if only or start:
            chosen = (only,) if only else STAGES[STAGES.index(start) :]
        loaded = load_recipe(recipe, overrides)
        return run_pipeline(loaded, folder, quiet, chosen, again=start is not None)

    return call


def written(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_the_base_is_captured_and_measured_and_then_every_variant(
    run: Run, stages: StandIns, servers: Servers, recipe: Path, folder: Path
) -> None:
    result = run()
    assert servers.started == [CAPTURE, GPTQ, RTN]
    check_that_only_the_head_differs(servers.options[CAPTURE], servers.options[GPTQ])
    heads = ["splice gptq", "splice rtn", "verify gptq", "verify rtn"]
    assert stages.done == ["quantize", "score", *heads]
    assert result["greedy_identical"] is True and result["divergences"] == []
    # 6 new tokens: one from prefill, then 2, 1, 2: three drafts, two accepted.
    assert result["acceptance"] == pytest.approx(2 / 3)
    assert result["acceptance_served"] == {GPTQ: pytest.approx(2 / 3), RTN: pytest.approx(2 / 3)}
    assert result["acceptance_offline"] == dict.fromkeys(("rtn", "gptq", "mxfp4", "bf16"), 0.5)
    # All heads have the same counts, on every draw of texts.
    assert result["acceptance_difference"] == {"gptq-rtn": pytest.approx([0.0, 0.0])}
    assert set(result["decode_tok_s"]) == {"base", "mtp"}
    assert set(result["seconds"]) == set(MEASURED)
    assert result["checkpoint"] == str(folder / "splice" / GPTQ / "tiny-mtp")
    assert result["report"] is None
    for variant in (GPTQ, RTN):
        assert read(folder / "verify" / f"{variant}.json")["loaded_in_vllm"] is True

    page = run_pipeline(load_recipe(recipe), folder, quiet, ["report"])["report"]
    assert "tiny-mtp" in Path(page).read_text() and "66.7 %" in Path(page).read_text()
    for stage in ("capture", "splice", "verify", "bench", "report"):
        manifest = read(folder / stage / "manifest.json")
        assert (manifest["stage"], manifest["status"]) == (stage, "done")
        assert manifest["seconds"] > 0


@pytest.mark.parametrize("kept", [True, False])
def test_a_healed_head_is_spliced_if_it_drafts_better(
    run: Run, stages: StandIns, folder: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    upstreams: set[str] = set()

    def heal(*inputs: Any) -> None:
        *_, out, variant, _linears, _size, settings, _report = inputs
        assert (variant, settings.steps) == (GPTQ, 20)
        stages.finish("heal", out, HEAL | {"kept": kept})

    def splice(base: Path, upstream: Path, *rest: Any, **how: Any) -> None:
        upstreams.add(str(upstream.relative_to(folder.parent)))
        stages.splice(base, upstream, *rest, **how)

    monkeypatch.setattr("mtp_graft.stages.heal.heal", heal)
    monkeypatch.setattr(pipeline.run, "splice", splice)
    run("heal.steps=20", start="fetch")
    assert stages.done[:3] == ["quantize", "heal", "score"]
    assert upstreams == {"run/heal/upstream" if kept else "upstream"}
    page = (folder / "report" / "report.html").read_text()
    assert ("not kept: what was spliced is the head as upstream has it" in page) is not kept
    with pytest.raises(GraftError, match=r"no section \[heal\]"):
        run(only="heal")
    with locked(folder), pytest.raises(GraftError, match="another mtp-graft works in this run fol"):
        run(only="fetch")


def test_killed_call_is_timed(recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0, 5, 5, 7, 20, 21))
    monkeypatch.setattr(pipeline.folder.time, "perf_counter", lambda: float(next(now)))
    work = pipeline.folder.Run(load_recipe(recipe), folder)
    work.seconds["bench"] = 1.0
    folder.mkdir()
    with work.timed("capture"):
        work.progress("capture: record", 1, 2)
        with work.timed("bench"):
            assert read(folder / "run.json") == {"seconds": {"bench": 1.0, "capture": 7.0}}
    assert work.seconds == {"bench": 14.0, "capture": 8.0}


def check_that_only_the_head_differs(base: ServeOptions, head: ServeOptions) -> None:
    assert tuple(a for a in head.extra_args if a not in COUNT_DRAFTS) == base.extra_args
    assert base.extra_args[-2:] == ("--seed", "7"), "the recipe's come last, and win"
    same = {"checkpoint": base.checkpoint, "extra_args": base.extra_args}
    assert base == replace(head, num_speculative_tokens=0, **same)
    assert base.max_model_len == 64


@pytest.fixture
def on_gpus(site: Path, cuda_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs without NVLink; CUDA builds of vLLM and torch, which this process leaves alone."""
    for name in [name for name in os.environ if name.startswith(("NCCL_", "VLLM_USE_"))]:
        monkeypatch.delenv(name)
    for info in site.glob("*.dist-info"):
        shutil.rmtree(info)
    install(site, version="0.33.0")
    gpu = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
    install_gpus(monkeypatch, gpu, gpu, memory_mib=97887)


@pytest.mark.usefixtures("on_gpus")
def test_on_gpus_the_base_has_a_server_of_its_own_and_all_get_the_hardwares_settings(
    run: Run, stages: StandIns, servers: Servers, folder: Path, capsys: Any
) -> None:
    run("bench.k=2", "serve.tensor_parallel_size=2")
    assert stages.apart == ["quantize", "score"], "their GPU memory is free for vLLM afterwards"
    assert servers.started == [CAPTURE, BASE, GPTQ, RTN]
    assert servers.options[CAPTURE].record == folder / "capture"
    assert servers.options[BASE].record is None
    check_that_only_the_head_differs(servers.options[BASE], servers.options[GPTQ])
    assert servers.options[GPTQ].num_speculative_tokens == 2
    for options in servers.options.values():
        assert "--disable-custom-all-reduce" in options.extra_args
        assert options.environment["NCCL_P2P_DISABLE"] == "1"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("serving: ")]
    assert told and len(set(told)) == len(told), "each once"
    adjusted = read(folder / "bench" / "decode.json")["adjusted"]
    assert {f"serving: {text}" for text in adjusted} == set(told)


@pytest.mark.parametrize(
    ("file", "settings", "timed"),
    [
        ("prompts", (), "p5"),
        ("prompts", ("capture.max_prompt_tokens=5",), "p7"),
        ("prompts", ("capture.max_model_len=15", "bench.max_tokens=9"), "p6"),
        ("others", (), "p0"),  # another file's prompts are others, whatever they are called
    ],
)
def test_prompts_to_time_are_none_of_those_captured_and_leave_room_for_the_answer(
    file: str, settings: Any, timed: str, run: Run, recipe: Path, folder: Path
) -> None:
    """Five are captured: p0 to p4, or where 7 tokens are too long, p1 to p4 and p6."""
    source = recipe.parent / "prompts.jsonl"
    for path in (source, source.with_stem("others")):
        write_prompts(path, "p", (7, 1, 2, 3, 4, 8, 5, 6))
    prompts = f"bench.prompts={source.with_stem(file)}"
    run(*settings, prompts, "bench.count=1", "bench.acceptance_count=1")
    assert [*read(folder / "bench" / "base.json")["prompts"]] == [timed]
    served = read(folder / "bench" / f"served-{GPTQ}.json")
    assert len(served["sequences"]) == 1, "as many evaluation texts as the recipe says"


def test_nothing_is_done_twice(run: Run, stages: StandIns, servers: Servers, folder: Path) -> None:
    first = run()
    kept = [written(folder / stage) for stage in ("capture", "quantize", "score")]
    second = run()
    assert servers.started == []
    assert stages.done == []
    assert kept == [written(folder / stage) for stage in ("capture", "quantize", "score")]
    assert {**first, "seconds": None} == {**second, "seconds": None}
    assert all(second["seconds"][stage] >= first["seconds"][stage] for stage in MEASURED)
    loaded = read(folder / "verify" / "gptq.json")["loaded_in_vllm"]
    assert loaded is True, "the second run forgets that it was served"

    (folder / "splice" / RTN / "tiny-mtp" / HEAD_SHARD).write_text("another head")
    run()
    assert (servers.started, stages.done) == ([RTN], [f"verify {RTN}"])


def test_stages_apart_give_the_same(run: Run, recipe: Path, servers: Servers, folder: Path) -> None:
    whole, loaded = run(), load_recipe(recipe)
    shutil.rmtree(folder)
    results = {stage: run_stage(loaded, folder, stage, quiet) for stage in ("fetch", "capture")}
    with pytest.MonkeyPatch.context() as without_vllm:
        only_from(Path("nothing"), without_vllm)
        for stage in ("quantize", "score", "splice", "verify"):
            results[stage] = run_stage(loaded, folder, stage, quiet)
        with pytest.raises(GraftError, match=r"[Vv]LLM"):
            run(only="bench")
    timing = {"seconds": None, "decode_tok_s": None}
    assert {**run(only="bench"), **timing} == {**whole, **timing}
    assert servers.started == [BASE, GPTQ, RTN]

    assert results["fetch"]["base"] == str(recipe.parent / "base")
    assert results["capture"]["splits"] == {"calibration": 3, "evaluation": 2}
    assert results["splice"]["variant"] == results["verify"]["variant"] == "gptq"
    assert results["splice"]["checkpoint"] == str(folder / "splice" / "gptq" / "tiny-mtp")


def test_from_redoes_the_rest(run: Run, stages: StandIns, servers: Servers, folder: Path) -> None:
    first = run()
    kept = [written(folder / stage) for stage in ("capture", "quantize")]
    for stage in ("score", "splice", "verify", "bench"):
        (folder / stage / "stray").touch()
    about = read(folder / "run.json")
    about["seconds"]["score"] = 1e6
    (folder / "run.json").write_text(json.dumps(about))
    second = run(start="score")
    assert [written(folder / stage) for stage in ("capture", "quantize")] == kept
    assert not list(folder.rglob("stray"))
    assert stages.done[:3] == ["score", "splice gptq", "splice rtn"]
    assert servers.started == [BASE, GPTQ, RTN]
    assert second["seconds"]["score"] < 1e6
    assert second["seconds"]["quantize"] == first["seconds"]["quantize"]
    assert second["acceptance"] == first["acceptance"]


def test_a_stage_before_its_time_names_the_one_to_run_first(run: Run, servers: Servers) -> None:
    def refused(stage: str, needed: str, *overrides: str) -> None:
        message = rf"/{needed}: not finished; run `mtp-graft {needed}` f"
        with pytest.raises(GraftError, match=message):
            run(*overrides, only=stage)
        assert servers.started == [], "it is said before anything is served"

    for stage in ("quantize", "score", "bench"):
        refused(stage, "capture")
    run(only="capture")
    for stage in ("score", "splice"):
        refused(stage, "quantize")
    run(only="quantize")
    for stage in ("score", "splice"):
        refused(stage, "heal", "heal.k=1")
    for stage in ("verify", "bench"):
        refused(stage, "splice")


def test_misfits_start_nothing(run: Run, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Mock(side_effect=GraftError("has a head already"))
    monkeypatch.setattr(pipeline.run, "check_run", refusal)
    for stage in ("fetch", "capture"):
        with pytest.raises(GraftError, match="has a head already"):
            run(only=stage)
    assert servers.started == []


def test_what_was_measured_is_not_mixed(run: Run, servers: Servers, folder: Path) -> None:
    run()
    with pytest.raises(GraftError, match=r"bench: was begun with bench\.max_tokens = 8, now it is"):
        run("bench.max_tokens=16")
    (folder / "bench" / "base.json").write_text('{"prompts": [')
    with pytest.raises(GraftError, match=r"bench/base\.json: not a result .not JSON.*; remove it"):
        run()
    assert servers.started == []


def test_a_server_that_dies_loses_nothing_done(run: Run, servers: Servers, folder: Path) -> None:
    servers.settings[RTN] = {"mode": "dies"}
    with pytest.raises(GraftError, match=r"splice/rtn/tiny-mtp: vLLM ended .*vllm-rtn\.log"):
        run()
    loaded = [read(folder / "verify" / f"{v}.json")["loaded_in_vllm"] for v in (GPTQ, RTN)]
    assert loaded == [True, None]
    assert not (folder / "bench" / "manifest.json").exists()
    servers.settings.clear()
    result = run()
    assert servers.started == [RTN], "the base and gptq were measured before"
    assert result["acceptance_served"].keys() == {GPTQ, RTN}


def test_failed_verify_ends_run(run: Run, stages: StandIns, servers: Servers, folder: Path) -> None:
    stages.missing = ["mtp.0.norm.weight"]
    message = r"gptq/tiny-mtp: mtp\.0\.norm\.weight: wrong \(1 in all\); remove it"
    with pytest.raises(GraftError, match=message):
        run()
    assert servers.started == [CAPTURE]
    assert not (folder / "verify" / "manifest.json").exists()
    assert read(folder / "verify" / "gptq.json")["missing"] == stages.missing
