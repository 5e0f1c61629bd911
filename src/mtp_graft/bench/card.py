"""The model card of a run: README.md and charts for the hub, made from `card.json`."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import mtp_graft
from mtp_graft.bench import charts
from mtp_graft.bench.card_data import collect_results
from mtp_graft.bench.page import as_markdown, number, percent, render
from mtp_graft.bench.report import decode_rows
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
    text = render("card.md.jinja", as_markdown, {**card, "vllm": mtp_graft.SUPPORTED_VLLM})
    page = ModelCard(f"---\n{_metadata(card).to_yaml()}\n---\n\n{text}")
    drawn = dict(_draw(card))  # of numbers that the page has, too
    card["charts"] = sorted(drawn)
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


def _draw(card: Json) -> Iterator[tuple[str, bytes]]:
    """Yield the charts that there are numbers for, with their file names."""
    if card["acceptance"]:
        yield "acceptance.png", charts.acceptance_chart(card["acceptance"])
    for m in card["sweep"]:
        yield m["chart"], charts.sweep_chart(m["result"]["points"])
    for name, (title, rows_of) in _ROW_CHARTS.items():
        if rows := [row for m in card[name] for row in rows_of(m["label"], m["result"])]:
            yield f"{name}.png", charts.row_chart(title, rows)


def _decode_rows(label: str, result: Json) -> list[charts.Row]:
    sides = {f"{label}, base": result["against"]} if result.get("against") else {}
    ours = "with MTP" if result["acceptance"] else "without drafts"
    return decode_rows({**sides, f"{label}, {ours}": result})


def _workload_rows(label: str, result: Json) -> list[charts.Row]:
    parts = {**result["categories"], "all": result}
    speeds = {f"{label}, {name}": part["decode_tok_s"] for name, part in parts.items()}
    known = ((name, speed) for name, speed in speeds.items() if speed is not None)
    return [charts.Row(name, speed, number(speed)) for name, speed in known]


def _score_rows(label: str, result: Json) -> list[charts.Row]:
    shown = f"{percent(result['score'])}  ({result['correct']} of {result['total']})"
    return [charts.Row(label, result["score"], shown, interval=result["interval"])]


_ROW_CHARTS: Mapping[str, tuple[str, Callable[[str, Json], list[charts.Row]]]] = {
    "decode": ("Decode speed, one request at a time, tokens a second", _decode_rows),
    "workload": ("Everyday requests, tokens a second", _workload_rows),
    "scores": ("Share of right answers, with 95 % intervals", _score_rows),
}


def _metadata(card: Json) -> ModelCardData:
    """Return the card's header, as the hub reads it."""
    name, base = card["checkpoint"]["name"], card["origins"]["base"]["id"]
    results = [_eval_result(m) for m in card["scores"] if m["benchmark"] in _DATASETS]
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
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=measurement["label"],
        dataset_config=config,
        dataset_split="test",
        metric_type=metric,
        metric_name=f"{metric}, % of {measurement['result']['total']:,} questions",
        metric_value=round(100 * measurement["result"]["score"], 1),
    )
