"""The report of a run: one HTML file, made of the stages' JSON, that needs no other file.

Every number is one that a stage measured, or a ratio or sum of such numbers; what was not measured
is named as such. No dates: the same results give the same bytes.
"""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_graft.bench import charts
from mtp_graft.bench.page import as_html, number, points, render
from mtp_graft.checkpoint.files import write_text

PAGE_NAME = "report.html"


@dataclass(frozen=True)
class RunResults:
    """What a run found, as the stages' JSON; None for a stage that has not been run."""

    result: Mapping[str, Any]  # of `run` and `demo`
    capture: Mapping[str, Any] | None
    quantize: Mapping[str, Any] | None
    score: Mapping[str, Any] | None
    served: Mapping[str, Any] | None  # by head, as `bench.acceptance.measure_acceptance`
    decode: Mapping[str, Any] | None  # as `bench.decode.compare`
    verify: Mapping[str, Any] | None
    model: str
    device: str
    versions: Mapping[str, str]
    notes: Sequence[str]
    recorded: Mapping[str, Any] | None = None  # as `bench.answers.recorded_answers`


def write_report(folder: Path, results: RunResults) -> Path:
    """Write `report.html` to `folder` and return its path; GraftError if the disk is full."""
    heads = head_acceptance(results.served or {}, (results.score or {}).get("acceptance", {}))
    seconds: Mapping[str, float] = results.result["seconds"]
    data = {
        **vars(results),
        "heads": heads,
        "main": _main_head(results),
        "differences": list(_differences(results.result)),
        "seconds": seconds,
        "colours": {"own": charts.BASE_COLOUR, "draft": charts.MTP_COLOUR},
    }
    drawn = _draw(results, heads, seconds)
    data["charts"] = {name: b64encode(png).decode() for name, png in drawn.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PAGE_NAME
    write_text(render("report.html", as_html, data), path)
    return path


def head_acceptance(served: Mapping[str, Any], offline: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return `name`, `served` and `offline` of every head that was measured, None where it wasn't.

    They are as `bench.acceptance.measure_acceptance` and the score stage give them.
    """
    found = {*served, *offline}
    names = [
        *(n for n in charts.HEAD_COLOURS if n in found),
        *sorted(found - {*charts.HEAD_COLOURS}),
    ]
    return [{"name": n, "served": served.get(n), "offline": offline.get(n)} for n in names]


def _main_head(results: RunResults) -> str:
    """Return the head that the summary is about: gptq's, or else the verified checkpoint's."""
    if "gptq" in (results.served or {}):
        return "gptq"
    return (results.verify or {}).get("variant") or "served"


def _differences(result: Mapping[str, Any]) -> Iterator[str]:
    """Say which heads differ on the same texts, and by how much."""
    keys = {"served": "acceptance_difference", "offline": "acceptance_difference_offline"}
    for where, key in keys.items():
        for pair, (low, high) in (result.get(key) or {}).items():
            ours, _, theirs = pair.partition("-")
            if low <= 0 <= high:
                verdict = f"no difference between {ours} and {theirs} is shown"
            else:
                verdict = f"{ours} is accepted {'more' if low > 0 else 'less'} often than {theirs}"
            yield (
                f"On the same texts, {where}: {verdict}; the difference is {points(low)} to "
                f"{points(high)} points (95 %, resampling texts)."
            )


def _draw(
    results: RunResults, heads: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]
) -> dict[str, bytes]:
    """Return the charts that there are numbers for, by name."""
    drawn: dict[str, bytes] = {}
    if heads:
        drawn["acceptance"] = charts.acceptance_chart(heads)
    if results.quantize:
        counts = results.quantize["tokens_per_expert"]["counts"]
        rounded = {head: results.quantize["rel_errors"][head] for head in ("rtn", "gptq")}
        drawn["errors"] = charts.error_chart(rounded, counts)
        drawn["tokens"] = charts.token_chart(counts)
    if results.decode:
        bars = decode_bars({"base": results.decode["against"], "with MTP": results.decode})
        title = "Decode speed, tokens a second: median, slowest and fastest round"
        drawn["decode"] = charts.bar_chart(title, bars)
    if seconds:
        bars = [charts.Bar(stage, s, number(s)) for stage, s in seconds.items()]
        drawn["stages"] = charts.bar_chart("Time of each stage, seconds", bars)
    return drawn


def decode_bars(decoded: Mapping[str, Mapping[str, Any]]) -> list[charts.Bar]:
    """Return a bar for each result of `bench decode`, the base's (without acceptance) in grey."""
    bars = []
    for name, result in decoded.items():
        speed = result["decode_tok_s"]
        colour = charts.MTP_COLOUR if result["acceptance"] else charts.BASE_COLOUR
        whisker = (speed["min"], speed["max"])
        bars.append(charts.Bar(name, speed["median"], number(speed["median"]), colour, whisker))
    return bars
