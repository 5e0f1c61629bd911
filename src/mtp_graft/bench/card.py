"""The model card of a run: README.md and charts for the hub, made from `card.json`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import mtp_graft
from mtp_graft.bench import charts
from mtp_graft.bench.card_data import collect_results
from mtp_graft.bench.page import as_markdown, number, percent, render
from mtp_graft.bench.report import decode_bars
from mtp_graft.checkpoint.files import write_json, write_text
from mtp_graft.checkpoint.manifest import read_result
from mtp_graft.checkpoint.quant_manifest import CARD_NAME, TRACE_NAME

Json = Mapping[str, Any]

#: By evaluation: hub id, config and metric. Our own tasks are no dataset of the hub.
_DATASETS = {
    "gsm8k": ("openai/gsm8k", "main", "exact_match"),
    "humaneval": ("openai/openai_humaneval", None, "pass@1"),
    "mmlu": ("cais/mmlu", "all", "accuracy"),
}
_TAGS = ("deepseek-v4", "mtp", "speculative-decoding", "compressed-tensors", "mtp-graft")


def write_card(run: Path, out: Path) -> dict[str, Any]:
    """Write the card of a run to `out`: charts, `card.json`, and `README.md` last.

    Returns the JSON of `mtp-graft card`. Charts of an earlier card that this one has not are
    removed. Raises GraftError if the run has no checkpoint, and for results that cannot be read.
    """
    card = collect_results(run)
    drawn = _draw(card)
    card["charts"] = sorted(drawn)
    text = render("card.md.jinja", as_markdown, {**card, "vllm": mtp_graft.SUPPORTED_VLLM})
    page = ModelCard(f"---\n{_metadata(card).to_yaml()}\n---\n\n{text}")
    earlier = read_result(out / TRACE_NAME) or {}
    for name in {*earlier.get("charts", ())} - {*drawn}:
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    for name, png in drawn.items():
        (out / name).write_bytes(png)
    write_json(card, out / TRACE_NAME)
    write_text(str(page), out / CARD_NAME)
    return {
        "card": str(out / CARD_NAME),
        "data": str(out / TRACE_NAME),
        **{key: card[key] for key in ("charts", "not_measured", "left_out")},
    }


def _draw(card: Json) -> dict[str, bytes]:
    """Return the charts that there are numbers for, by file name; one device to a chart."""
    drawn: dict[str, bytes] = {}
    if card["acceptance"]:
        drawn["acceptance.png"] = charts.acceptance_chart(card["acceptance"])
    for group in card["sweep"]:
        for measurement in group["measurements"]:
            drawn[measurement["chart"]] = charts.sweep_chart(measurement["result"]["points"])
    for name, (title, bars_of, limit) in _BAR_CHARTS.items():
        for group in card[name]:
            bars = [bar for m in group["measurements"] for bar in bars_of(m["label"], m["result"])]
            drawn[group["chart"]] = charts.bar_chart(title, bars, limit)
    return drawn


def _decode_bars(label: str, result: Json) -> list[charts.Bar]:
    sides = {f"{label}, base": result["against"]} if result.get("against") else {}
    ours = "with MTP" if result["acceptance"] else "without drafts"
    return decode_bars({**sides, f"{label}, {ours}": result})


def _workload_bars(label: str, result: Json) -> list[charts.Bar]:
    speeds = {name: each["decode_tok_s"] for name, each in result["categories"].items()}
    speeds["all"] = result["decode_tok_s"]
    return [
        charts.Bar(f"{label}, {category}", speed, number(speed))
        for category, speed in speeds.items()
        if speed is not None
    ]


def _score_bars(label: str, result: Json) -> list[charts.Bar]:
    score = result["correct"] / result["total"]
    shown = f"{percent(score)}  ({result['correct']} of {result['total']})"
    return [charts.Bar(label, score, shown, whisker=result["interval"])]


_BAR_CHARTS: Mapping[str, tuple[str, Callable[[str, Json], list[charts.Bar]], float | None]] = {
    "decode": ("Decode speed, one request at a time, tokens a second", _decode_bars, None),
    "workload": ("Everyday requests, tokens a second", _workload_bars, None),
    "scores": ("Share of right answers, with 95 % intervals", _score_bars, 1.0),
}


def _metadata(card: Json) -> ModelCardData:
    """Return the card's header, as the hub reads it."""
    name, base = card["checkpoint"]["name"], card["origins"]["base"]["id"]
    scores = [m for group in card["scores"] for m in group["measurements"]]
    results = [_eval_result(m) for m in scores if m["benchmark"] in _DATASETS]
    return ModelCardData(
        **card["license"],
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=[*_TAGS, card["checkpoint"]["variant"]],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _eval_result(measurement: Json) -> EvalResult:
    dataset, config, metric = _DATASETS[measurement["benchmark"]]
    correct, total = measurement["result"]["correct"], measurement["result"]["total"]
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=measurement["label"],
        dataset_config=config,
        dataset_split="test",
        metric_type=metric,
        metric_name=f"{metric}, % of {total:,} questions",
        metric_value=round(100 * correct / total, 1),
    )
