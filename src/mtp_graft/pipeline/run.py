"""A run: the stages in order, each as the recipe wants it, in one run folder (docs/pipeline.md).

A stage that is finished, and whose inputs are the same, returns what it found the first time. That
a variant was served in the bench stage is also verify's proof that vLLM loads it.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from mtp_graft.bench.intervals import paired_differences
from mtp_graft.bench.report import PAGE_NAME, write_report
from mtp_graft.checkpoint.manifest import package_versions, read_result, write_manifest
from mtp_graft.checkpoint.quant_manifest import MANIFEST_NAME
from mtp_graft.pipeline import STAGES, bench
from mtp_graft.pipeline.folder import Run, locked
from mtp_graft.pipeline.plan import check_prompts, check_run
from mtp_graft.recipe import Device, Recipe, Variant
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import find_vllm
from mtp_graft.stages.capture import capture, recording_options
from mtp_graft.stages.inputs import REPORT_NAME, Progress
from mtp_graft.stages.parallel import device_name, find_device, run_in_process
from mtp_graft.stages.splice import check_out, splice

_OF_HEAD = ("acceptance", "acceptance_by_position", "acceptance_length")


def run_pipeline(
    recipe: Recipe,
    folder: Path,
    report: Progress,
    stages: Sequence[str] = STAGES,
    *,
    again: bool = False,
) -> dict[str, Any]:
    """Run `stages` of `recipe` in the run folder; return the `run` command's JSON.

    What finished earlier is kept, unless `again` asks to remove the named stages' folders first.
    Raises GraftError if a stage fails, needs an earlier one, or if another process works there.
    """
    local = (g for g in (recipe.model.base, recipe.model.upstream) if g.startswith(("/", ".", "~")))
    check_out(folder, *(Path(given).expanduser() for given in local))
    with locked(folder):
        run = Run(recipe, folder, stages, report)
        if again:
            run.forget()
        for stage in run.stages:
            with run.timed(stage):
                inputs = _DO[stage](run)
            if inputs is not None:
                config = asdict(recipe).get(stage, {})
                made = device_name(), run.seconds[stage]
                write_manifest(folder / stage, stage, config, inputs, *made)
        return summarize(run)


def run_stage(recipe: Recipe, folder: Path, stage: str, report: Progress) -> dict[str, Any]:
    """Run one stage of `recipe` as `run_pipeline` does; return the stage's own JSON."""
    run_pipeline(recipe, folder, report, [stage])
    run, chosen = Run(recipe, folder), recipe.splice.variant
    if stage == "splice":
        checkpoint = run.checkpoint(chosen)
        return {"checkpoint": str(checkpoint), **(read_result(checkpoint / MANIFEST_NAME) or {})}
    return run.result(f"verify/{chosen}" if stage == "verify" else f"{stage}/report") or {}


def _fetch(run: Run) -> None:
    """Find both checkpoints, once everything else that can be refused has been looked at."""
    if {"capture", "bench"} & set(run.stages):
        find_vllm()
    check_run(run)
    check_prompts(run)
    _ = run.models


def _capture(run: Run) -> None:
    """Capture the base; where it would be served alike, measure it on the same server."""
    if "fetch" not in run.stages:
        _fetch(run)
    base, out, settings = run.models.base, run.path / "capture", run.capture
    options = recording_options(base, out, settings)
    with ExitStack() as stack:
        started: list[ServerClient] = []

        @contextmanager
        def start() -> Iterator[ServerClient]:
            with ThreadPoolExecutor(1) as pool:  # one by one, while a server starts on one core
                pool.map(import_module, ("mtp_graft.stages.quantize", "mtp_graft.stages.verify"))
                started.append(stack.enter_context(bench.serving(run, options, "capture")))
            yield started[0]

        capture(start(), base, out, settings, run.progress, bench.server_log(run, "capture"))
        if "bench" in run.stages and options == bench.measuring_options(run, base, 0):
            for client in started:  # none, if the capture was finished before
                with run.timed("bench"):
                    bench.measure_base(run, nullcontext(client))


def _quantize(run: Run) -> None:
    inputs = run.finished("capture"), run.models.upstream, run.models.base
    settings, out = run.recipe.quantize, run.path / "quantize"
    _compute(run, "quantize", settings.device, *inputs, out, settings)


def _heal(run: Run) -> None:
    settings, asked = run.recipe.heal, run.recipe.splice
    assert settings is not None  # or the stage is not among those to do
    inputs = run.finished("capture"), run.finished("quantize"), *reversed(run.models)
    how = asked.variant, asked.linear_dtype, run.recipe.quantize.group_size, settings
    _compute(run, "heal", settings.device, *inputs, run.path / "heal", *how)


def _score(run: Run) -> None:
    inputs = run.finished("capture"), run.finished("quantize"), run.upstream, run.models.base
    settings, out = run.recipe.score, run.path / "score"
    _compute(run, "score", settings.device, *inputs, out, run.recipe.quantize, settings)


def _compute(run: Run, stage: str, device: Device, *arguments: Any) -> None:
    """Call a stage; on a GPU in a process of its own, so that it is empty when vLLM starts."""
    call = getattr(import_module(f"mtp_graft.stages.{stage}"), stage)
    if find_device(device) == "cpu":
        call(*arguments, run.progress)
    else:
        run_in_process(call, *arguments, report=run.progress)


def _splice(run: Run) -> list[Path]:
    quantized, asked = run.finished("quantize"), run.recipe.splice
    how: dict[str, Any] = {"linear_dtype": asked.linear_dtype, "copy": asked.copy}
    for variant, out in _checkpoints(run, "splice"):
        out.parent.mkdir(parents=True, exist_ok=True)
        splice(run.models.base, run.upstream, out, variant, quantized=quantized, **how)
    return [quantized / REPORT_NAME]


def _checkpoints(run: Run, stage: str) -> Iterator[tuple[Variant, Path]]:
    for done, variant in enumerate(variants := run.recipe.served_variants):
        run.progress(f"{stage}: {variant}", done, len(variants))
        yield variant, run.checkpoint(variant)


def _verify(run: Run) -> list[Path]:
    from mtp_graft.stages.verify import require_sound, verify

    quantized, base = run.finished("quantize"), run.models.base
    run.finished("splice")
    for variant, checkpoint in _checkpoints(run, "verify"):
        files = {path.name: path.stat().st_mtime_ns for path in checkpoint.glob("*")}
        # The command alone always looks again.
        found = run.result(f"verify/{variant}") if "splice" in run.stages else None
        if not found or not found["ok"] or found.get("mtime_ns") != files:
            found = {**verify(checkpoint, base, run.upstream, quantized), "mtime_ns": files}
        found["loaded_in_vllm"] = True if bench.has_served(run, variant) else None
        run.keep(f"verify/{variant}", found)
        require_sound(checkpoint, found)
    return run.manifests


def summarize(run: Run) -> dict[str, Any]:
    """Return the JSON of `run` and `demo`; what has not been run yet is null."""
    decode = run.result("bench/decode") or {}
    scored = (run.result("score/report") or {}).get("acceptance", {})
    served, checkpoint = _served(run), run.checkpoint(run.recipe.splice.variant)
    main = served.get("gptq") or served.get(run.recipe.splice.variant) or {}
    report = run.path / "report" / PAGE_NAME
    sides = {"base": decode["against"], "mtp": decode} if decode else {}
    speeds = {side: found["decode_tok_s"]["median"] for side, found in sides.items()}
    return {
        "k": (decode or main).get("k"),
        **{key: main.get(key) for key in _OF_HEAD},
        "acceptance_served": {v: found["acceptance"] for v, found in served.items()},
        "acceptance_offline": {v: found["top1"] for v, found in scored.items()},
        "acceptance_difference": _differences(served),
        "acceptance_difference_offline": _differences(scored),
        "intervals_served": {v: found["interval"] for v, found in served.items()},
        "decode_tok_s": speeds or None,
        **{key: decode.get(key) for key in ("greedy_identical", "divergences")},
        "seconds": {s: run.seconds[s] for s in STAGES if s in run.seconds},
        "checkpoint": str(checkpoint),
        "drafter": (read_result(checkpoint / MANIFEST_NAME) or {}).get("drafter", "mtp"),
        "report": str(report) if report.exists() else None,
    }


def _report(run: Run) -> list[Path]:
    found = {
        "result": summarize(run),
        **{s: run.result(f"{s}/report") for s in ("capture", "quantize", "heal", "score")},
        "served": _served(run),
        "decode": run.result("bench/decode"),
        "verify": run.result(f"verify/{run.recipe.splice.variant}"),
        "model": run.recipe.model.name,
        "device": device_name(),
        "versions": package_versions(),
        "concurrency": run.recipe.capture.concurrency,
        "on_cpu": find_vllm().platform == "cpu",
    }
    write_report(run.path / "report", found)
    return []


def _served(run: Run) -> dict[str, dict[str, Any]]:
    found = {v: run.result(f"bench/served-{v}") for v in run.recipe.served_variants}
    return {variant: result for variant, result in found.items() if result}


def _differences(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return paired_differences({v: result.get("sequences") for v, result in found.items()})


_IN_ORDER = (_fetch, _capture, _quantize, _heal, _score, _splice, _verify, bench.bench, _report)
#: What does a stage. Where it writes no manifest of its own, it returns the inputs to be named.
_DO: dict[str, Callable[[Run], Sequence[Path] | None]] = dict(zip(STAGES, _IN_ORDER, strict=True))
