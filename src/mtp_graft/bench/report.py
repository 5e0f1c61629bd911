"""The report of a run: one HTML file, made of the stages' JSON, that needs no other file.

Every number is one that a stage measured, or a ratio or sum of such numbers; what was not measured
is named as such. No dates: the same results give the same bytes.
"""

from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_graft.bench import charts
from mtp_graft.bench.page import as_html, number, render
from mtp_graft.checkpoint.files import write_text

PAGE_NAME = "report.html"
Json = Mapping[str, Any]


def write_report(folder: Path, found: Json) -> Path:
    """Write `report.html` to `folder` and return its path; GraftError if the disk is full.

    `found` has `result` (of `run` and `demo`); `capture`, `quantize`, `heal`, `score` and `verify`,
    the stages' JSON; `served`, by head as `bench.decode.measure_acceptance`; and `decode`, as
    `bench.decode.compare`: all of these None where there is nothing (`served`: empty). It has
    `model`, `device`, `versions` by package, `on_cpu` and the capture's `concurrency`, too.
    """
    served, decode = found["served"], found["decode"]
    heads = head_acceptance(served, (found["score"] or {}).get("acceptance", {}))
    drawn = {"acceptance": charts.acceptance_chart(heads)} if heads else {}
    if decode:
        rows = decode_rows({"base": decode["against"], "with MTP": decode})
        title = "Decode speed, tokens a second: median, slowest and fastest round"
        drawn["decode"] = charts.row_chart(title, rows)
    data = {
        **found,
        "heads": heads,
        # The head that the summary is about.
        "main": "gptq" if "gptq" in served else (found["verify"] or {}).get("variant", "served"),
        "charts": {name: b64encode(png).decode() for name, png in drawn.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PAGE_NAME
    write_text(render("report.html", as_html, data), path)
    return path


def head_acceptance(served: Json, offline: Json) -> list[dict[str, Any]]:
    """Return `name`, `served` and `offline` of every head that was measured, None where it wasn't.

    They are as `bench.decode.measure_acceptance` and the score stage give them.
    """
    names = dict.fromkeys([*charts.HEAD_COLOURS, *served, *offline])
    found = [{"name": n, "served": served.get(n), "offline": offline.get(n)} for n in names]
    return [head for head in found if head["served"] or head["offline"]]


def decode_rows(decoded: Mapping[str, Json]) -> list[charts.Row]:
    """Return a bar for each result of `bench decode`, the base's (without acceptance) in grey."""
    rows = []
    for name, result in decoded.items():
        middle, *ends = (result["decode_tok_s"][key] for key in ("median", "min", "max"))
        colour = charts.MTP_COLOUR if result["acceptance"] else charts.BASE_COLOUR
        rows.append(charts.Row(name, middle, number(middle), colour, ends))
    return rows
