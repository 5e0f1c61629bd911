"""What a run has found so far, put together from the stages' files; and the report of it."""

from pathlib import Path
from typing import Any

from mtp_graft.bench.intervals import paired_differences
from mtp_graft.bench.report import PAGE_NAME, recorded_answers, write_report
from mtp_graft.checkpoint.manifest import package_versions
from mtp_graft.pipeline import STAGES
from mtp_graft.pipeline.device import device_name
from mtp_graft.pipeline.folder import Run
from mtp_graft.serving.command import find_vllm

_ERROR_NOTE = (
    "Relative errors are weighted with the Hessian of the calibration tokens themselves, which "
    "flatters GPTQ; acceptance is measured on other texts."
)
_CPU_NOTE = (
    "Served on a CPU by the plugin's reference path, on a model of a few layers: speeds show that "
    "the pipeline is right, not what the real model gains, and only their ratio within this run "
    "means anything."
)
_OF_HEAD = ("acceptance", "acceptance_by_position", "acceptance_length")


def summarize(run: Run) -> dict[str, Any]:
    """Return the JSON of `run` and `demo`; what has not been run yet is null."""
    decode = run.result("bench/decode") or {}
    scored = (run.result("score/report") or {}).get("acceptance", {})
    served, chosen = _served(run), run.recipe.splice.variant
    main = served.get("gptq") or served.get(chosen) or {}
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
        "checkpoint": str(run.checkpoint(chosen)),
        "report": str(report) if report.exists() else None,
    }


def report_run(run: Run) -> list[Path]:
    """Write the report stage's page."""
    served, capture = _served(run), run.recipe.capture
    decode = run.result("bench/decode")
    notes = [_ERROR_NOTE]
    notes += [
        f"{variant}: with drafts, {capture.concurrency} requests at once, {found['identical']} of "
        f"{found['texts']} texts equal the captured ones; sums then round in another order."
        for variant, found in served.items()
    ]
    if find_vllm().platform == "cpu":
        notes.append(_CPU_NOTE)
    notes += [f"Serving: {text}." for text in (decode or {}).get("adjusted", [])]
    found = {
        "result": summarize(run),
        **{stage: run.result(f"{stage}/report") for stage in ("capture", "quantize", "score")},
        "served": served,
        "decode": decode,
        "verify": run.result(f"verify/{run.recipe.splice.variant}"),
        "recorded": recorded_answers(run.result("bench/base"), run.result("bench/mtp")),
        "model": run.recipe.model.name,
        "device": device_name(),
        "versions": package_versions(),
        "notes": notes,
    }
    write_report(run.path / "report", found)
    return []


def _served(run: Run) -> dict[str, dict[str, Any]]:
    found = {v: run.result(f"bench/served-{v}") for v in run.recipe.served_variants}
    return {variant: result for variant, result in found.items() if result is not None}


def _differences(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return paired_differences({v: result.get("sequences") for v, result in found.items()})
