"""What a run has found so far, put together from the stages' files; and the report of it."""

from collections.abc import Mapping
from typing import Any

from mtp_graft.bench.answers import recorded_answers
from mtp_graft.bench.intervals import paired_differences
from mtp_graft.bench.report import PAGE_NAME, RunResults, write_report
from mtp_graft.checkpoint.manifest import package_versions, read_result
from mtp_graft.pipeline.device import device_name
from mtp_graft.pipeline.folder import STAGES, RunFolder
from mtp_graft.recipe import Recipe
from mtp_graft.serving.command import find_vllm
from mtp_graft.stages.inputs import REPORT_NAME

_ERROR_NOTE = (
    "Relative errors are weighted with the Hessian of the calibration tokens themselves, which "
    "flatters GPTQ; acceptance is measured on other texts."
)
_CPU_NOTE = (
    "Served on a CPU by the plugin's reference path, on a model of a few layers: speeds show that "
    "the pipeline is right, not what the real model gains, and only their ratio within this run "
    "means anything."
)


def summarize(recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """Return the JSON of `run` and `demo`; what has not been run yet is null."""
    decode = read_result(folder.bench_unit("decode")) or {}
    scored = (read_result(folder.stage("score") / REPORT_NAME) or {}).get("acceptance", {})
    served = _served(recipe, folder)
    main = served.get("gptq") or served.get(recipe.splice.variant) or {}
    report = folder.stage("report") / PAGE_NAME
    return {
        "acceptance": main.get("acceptance"),
        "k": (decode or main).get("k"),
        "acceptance_by_position": main.get("acceptance_by_position"),
        "acceptance_length": main.get("acceptance_length"),
        "acceptance_served": {v: found["acceptance"] for v, found in served.items()},
        "acceptance_offline": {v: a["top1"] for v, a in scored.items()},
        "acceptance_difference": paired_differences(
            {variant: found.get("sequences") for variant, found in served.items()}
        ),
        "acceptance_difference_offline": paired_differences(
            {variant: found["sequences"] for variant, found in scored.items()}
        ),
        "intervals_served": {v: found["interval"] for v, found in served.items()},
        "decode_tok_s": _speeds(decode) if decode else None,
        **{key: decode.get(key) for key in ("greedy_identical", "divergences")},
        "seconds": {s: folder.seconds[s] for s in STAGES if s in folder.seconds},
        "checkpoint": str(folder.checkpoint(recipe.splice.variant)),
        "report": str(report) if report.exists() else None,
    }


def _speeds(decode: Mapping[str, Any]) -> dict[str, float]:
    sides = {"base": decode["against"], "mtp": decode}
    return {name: side["decode_tok_s"]["median"] for name, side in sides.items()}


def report_run(recipe: Recipe, folder: RunFolder) -> None:
    """Write the report stage's page and charts."""
    served, decode = _served(recipe, folder), read_result(folder.bench_unit("decode"))
    notes = [
        _ERROR_NOTE,
        *(
            f"{variant}: with drafts, {recipe.capture.concurrency} requests at once, "
            f"{found['identical']} of {found['texts']} texts equal the captured ones; sums then "
            "round in another order."
            for variant, found in served.items()
        ),
        *([_CPU_NOTE] if find_vllm().platform == "cpu" else []),
        *(f"Serving: {text}." for text in (decode or {}).get("adjusted", [])),
    ]
    stages = ("capture", "quantize", "score")
    results = RunResults(
        result=summarize(recipe, folder),
        **{stage: read_result(folder.stage(stage) / REPORT_NAME) for stage in stages},
        served=served or None,
        decode=decode,
        verify=read_result(folder.verified(recipe.splice.variant)),
        model=recipe.model.name,
        device=device_name(),
        versions=package_versions(),
        notes=notes,
        recorded=recorded_answers(*(read_result(folder.bench_unit(u)) for u in ("base", "mtp"))),
    )
    write_report(folder.stage("report"), results)


def _served(recipe: Recipe, folder: RunFolder) -> dict[str, dict[str, Any]]:
    found = {v: read_result(folder.bench_unit(f"served-{v}")) for v in recipe.served_variants}
    return {variant: result for variant, result in found.items() if result is not None}
