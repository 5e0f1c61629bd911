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
from mtp_graft.bench.page import as_html, number, render
from mtp_graft.checkpoint.files import write_text

PAGE_NAME = "report.html"
Json = Mapping[str, Any]


@dataclass(frozen=True)
class RunResults:
    """What a run found, as the stages' JSON; None for a stage that has not been run."""

    result: Json  # of `run` and `demo`
    capture: Json | None
    quantize: Json | None
    score: Json | None
    served: Json | None  # by head, as `bench.acceptance.measure_acceptance`
    decode: Json | None  # as `bench.decode.compare`
    verify: Json | None
    model: str
    device: str
    versions: Mapping[str, str]
    notes: Sequence[str]
    recorded: Json | None = None  # as `bench.answers.recorded_answers`


def write_report(folder: Path, results: RunResults) -> Path:
    """Write `report.html` to `folder` and return its path; GraftError if the disk is full."""
    served = results.served or {}
    heads = head_acceptance(served, (results.score or {}).get("acceptance", {}))
    main = "gptq" if "gptq" in served else (results.verify or {}).get("variant") or "served"
    drawn = {name: b64encode(png).decode() for name, png in _draw(results, heads)}
    data = {
        **vars(results),
        "heads": heads,
        "main": main,  # the head that the summary is about
        "seconds": results.result["seconds"],
        "colours": {"own": charts.BASE_COLOUR, "draft": charts.MTP_COLOUR},
        "charts": drawn,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PAGE_NAME
    write_text(render("report.html", as_html, data), path)
    return path


def head_acceptance(served: Json, offline: Json) -> list[dict[str, Any]]:
    """Return `name`, `served` and `offline` of every head that was measured, None where it wasn't.

    They are as `bench.acceptance.measure_acceptance` and the score stage give them.
    """
    names = dict.fromkeys([*charts.HEAD_COLOURS, *served, *offline])
    found = [{"name": n, "served": served.get(n), "offline": offline.get(n)} for n in names]
    return [head for head in found if head["served"] or head["offline"]]


def _draw(results: RunResults, heads: Sequence[Json]) -> Iterator[tuple[str, bytes]]:
    """Yield the charts that there are numbers for, with their names."""
    if heads:
        yield "acceptance", charts.acceptance_chart(heads)
    if results.decode:
        rows = decode_rows({"base": results.decode["against"], "with MTP": results.decode})
        title = "Decode speed, tokens a second: median, slowest and fastest round"
        yield "decode", charts.row_chart(title, rows)


def decode_rows(decoded: Mapping[str, Json]) -> list[charts.Row]:
    """Return a bar for each result of `bench decode`, the base's (without acceptance) in grey."""
    rows = []
    for name, result in decoded.items():
        speed = result["decode_tok_s"]
        colour = charts.MTP_COLOUR if result["acceptance"] else charts.BASE_COLOUR
        ends = (speed["min"], speed["max"])
        rows.append(charts.Row(name, speed["median"], number(speed["median"]), colour, ends))
    return rows
