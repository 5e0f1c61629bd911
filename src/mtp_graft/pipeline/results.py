"""What a run has found so far, put together from the stages' files; and the report of it."""

from collections.abc import Mapping
from typing import Any

from mtp_graft.bench.paired import paired_differences
from mtp_graft.bench.report import PAGE_NAME, RunResults, write_report
from mtp_graft.checkpoint.manifest import package_versions, read_result
from mtp_graft.pipeline.device import device_name
from mtp_graft.pipeline.folder import RunFolder
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
    counts = {variant: found.get("sequences") for variant, found in served.items()}
    return {
        "acceptance": main.get("acceptance"),
        "k": (decode.get("mtp") or main).get("k"),
        "acceptance_by_position": main.get("acceptance_by_position"),
        "acceptance_length": main.get("acceptance_length"),
        "acceptance_served": {v: found["acceptance"] for v, found in served.items()},
        "acceptance_offline": {v: a["top1"] for v, a in scored.items()},
        "acceptance_offline_on_served": _offline_on_served(scored, served),
        "acceptance_difference": paired_differences(counts),
        "acceptance_difference_offline": paired_differences(
            {variant: found["sequences"] for variant, found in scored.items()}
        ),
        "intervals_served": {v: found["interval"] for v, found in served.items()},
        "drafts_served": {v: found["drafted"] for v, found in served.items()},
        "decode_tok_s": decode.get("decode_tok_s"),
        "greedy_identical": decode.get("greedy_identical"),
        "divergences": decode.get("divergences"),
        "seconds": folder.seconds,
        "checkpoint": str(folder.checkpoint(recipe.splice.variant)),
        "report": str(report) if report.exists() else None,
    }


def report_run(recipe: Recipe, folder: RunFolder) -> None:
    """Write the report stage's page and charts."""
    served = _served(recipe, folder)
    on_cpu = find_vllm().platform == "cpu"
    notes = [
        _ERROR_NOTE,
        *_identity_notes(served, recipe.capture.concurrency),
        *([_CPU_NOTE] if on_cpu else []),
        *(f"Serving: {text}." for text in _adjusted(folder)),
    ]
    results = RunResults(
        result=summarize(recipe, folder),
        capture=read_result(folder.stage("capture") / REPORT_NAME),
        quantize=read_result(folder.stage("quantize") / REPORT_NAME),
        score=read_result(folder.stage("score") / REPORT_NAME),
        served=served or None,
        decode=read_result(folder.bench_unit("decode")),
        verify=read_result(folder.verified(recipe.splice.variant)),
        model=recipe.model.name,
        device=device_name(),
        versions=package_versions(),
        notes=notes,
        recorded=_recorded(folder),
    )
    write_report(folder.stage("report"), results)


def _served(recipe: Recipe, folder: RunFolder) -> dict[str, dict[str, Any]]:
    found = {v: read_result(folder.bench_unit(f"served-{v}")) for v in recipe.served_variants}
    return {variant: result for variant, result in found.items() if result is not None}


def _adjusted(folder: RunFolder) -> list[str]:
    """Return what the hardware made of the servers' options."""
    return (read_result(folder.bench_unit("decode")) or {}).get("adjusted", [])


def _recorded(folder: RunFolder) -> dict[str, Any] | None:
    """Return the answers that the bench stage recorded, None where it has not been run."""
    base, mtp = (read_result(folder.bench_unit(unit)) for unit in ("base", "mtp"))
    if base is None or mtp is None:
        return None
    prompts = [prompt["id"] for prompt in base["prompts"]]
    return {"prompts": prompts, "base": base.get("stream"), "mtp": mtp.get("stream")}


def _offline_on_served(
    scored: Mapping[str, Mapping[str, Any]], served: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Return each served variant's offline acceptance on the texts that were served."""
    rates = {}
    for variant in scored.keys() & served.keys():
        walks = scored[variant]["sequences"][: served[variant]["texts"]]
        rates[variant] = sum(w["accepted"] for w in walks) / sum(w["drafts"] for w in walks)
    return rates


def _identity_notes(served: Mapping[str, Mapping[str, Any]], at_once: int) -> list[str]:
    """Say how many of the texts served at once came out as captured."""
    return [
        f"{variant}: with drafts, {at_once} requests at once, {found['identical']} of "
        f"{found['texts']} texts equal the captured ones; sums then round in another order."
        for variant, found in served.items()
    ]
