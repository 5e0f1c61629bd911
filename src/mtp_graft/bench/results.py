"""What the report is made of: the stages' JSON, and the shapes that its sections need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtp_graft.bench.charts import Rate

_STAGES = ("fetch", "capture", "quantize", "score", "splice", "verify", "bench", "report")


@dataclass(frozen=True)
class RunResults:
    """What a run found, as the stages' JSON; None for a stage that has not been run."""

    result: Mapping[str, Any]  # of `run` and `demo`
    capture: Mapping[str, Any] | None
    quantize: Mapping[str, Any] | None
    score: Mapping[str, Any] | None
    served: Mapping[str, Any] | None  # by variant, as `bench.acceptance.measure_acceptance`
    decode: Mapping[str, Any] | None  # of `bench.decode.compare`
    verify: Mapping[str, Any] | None
    model: str
    device: str
    versions: Mapping[str, str]
    notes: Sequence[str]
    #: `prompts` (ids); `base` and `mtp`, as `bench.decode.median_round`, None if not kept.
    recorded: Mapping[str, Any] | None = None


def served_rates(results: RunResults) -> dict[str, Rate]:
    """Return how often the servers accepted a step's first draft."""
    return {variant: first_draft(found) for variant, found in (results.served or {}).items()}


def first_draft(served: Mapping[str, Any]) -> Rate:
    """Return how often a served head's first draft of a step was accepted.

    That is what the score stage computes, and the same quantity for every k.
    """
    return Rate(
        served["acceptance_by_position"][0],
        tuple(served["acceptance_by_position_interval"][0]),
        served["accepted_by_position"][0],
        served["steps"],
    )


def offline_rates(results: RunResults) -> dict[str, Rate]:
    """Return the score stage's acceptance; the summary's rates have no interval."""
    if results.score is None:
        return {v: Rate(rate) for v, rate in results.result["acceptance_offline"].items()}
    return {variant: walked(found) for variant, found in results.score["acceptance"].items()}


def walked(scored: Mapping[str, Any]) -> Rate:
    """Return a head's offline acceptance."""
    return Rate(scored["top1"], tuple(scored["interval"]), scored["accepted"], scored["tokens"])


def expert_errors(quantize: Mapping[str, Any]) -> dict[str, Mapping[str, Sequence[float]]]:
    """Return the errors of the variants that round; the others' are zero."""
    return {v: quantize["rel_errors"][v] for v in ("rtn", "gptq")}


def stage_seconds(results: RunResults) -> dict[str, float]:
    """Return the time that each stage took, in the stages' order."""
    found: Mapping[str, float] = results.result["seconds"]
    known = {stage: found[stage] for stage in _STAGES if stage in found}
    return {**known, **found}


def speedup(results: RunResults) -> float | None:
    """Return the decode speed with MTP over the base's."""
    speeds = results.result["decode_tok_s"]
    return speeds["mtp"] / speeds["base"] if speeds else None


def main_variant(results: RunResults) -> str:
    """Return whose acceptance is the headline: gptq's, or else that of the verified checkpoint."""
    if "gptq" in served_rates(results):
        return "gptq"
    return (results.verify or {}).get("variant") or "served"
