"""The report of a run: one HTML file, made of the stages' JSON, that needs no other file.

What was not measured is named as such. No dates: the same results give the same bytes.

And the charts, of the card too. A head keeps its colour in all of them (Okabe and Ito's palette,
safe for colour-blind readers). They are 6 inches wide: 600 pixels, stored with twice as many.
"""

import io
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from mtp_graft.bench.page import as_html, number, percent, render
from mtp_graft.checkpoint.files import write_text

PAGE_NAME = "report.html"
Json = Mapping[str, Any]

HEAD_COLOURS = {"rtn": "#d55e00", "gptq": "#0072b2", "mxfp4": "#009e73", "bf16": "#5c5c5c"}
BASE_COLOUR, MTP_COLOUR, BAR_COLOUR = "#bdbdbd", "#56b4e9", "#7aa6c2"
#: By number of drafts a step.
_K_COLOURS = {0: BASE_COLOUR, 1: "#0072b2", 2: "#d55e00", 3: "#009e73"}
_OTHER_COLOUR = "#cc79a7"


class Row(NamedTuple):
    """A row of a chart: its value, the text beside it, and the ends of its interval."""

    name: str
    value: float
    label: str
    colour: str = BAR_COLOUR
    interval: Sequence[float] | None = None


def write_report(folder: Path, found: Json) -> Path:
    """Write `report.html` to `folder` and return its path.

    `found` has `result` (of `run` and `demo`); the stages' JSON; `served`, by head as
    `measure_acceptance`; `decode`, as `compare`: None where there is nothing (`served`: empty);
    `model`, `device`, `versions`, `on_cpu`, `concurrency`.
    """
    served, decode = found["served"], found["decode"]
    heads = head_acceptance(served, (found["score"] or {}).get("acceptance", {}))
    drawn = {"acceptance": acceptance_chart(heads)} if heads else {}
    if decode:
        rows = decode_rows({"base": decode["against"], "with drafts": decode})
        title = "Decode speed, tokens a second: median, slowest and fastest round"
        drawn["decode"] = row_chart(title, rows)
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
    """Return `name`, `served` and `offline` (None if not measured) of every head that was."""
    names = dict.fromkeys([*HEAD_COLOURS, *served, *offline])
    found = [{"name": n, "served": served.get(n), "offline": offline.get(n)} for n in names]
    return [head for head in found if head["served"] or head["offline"]]


def decode_rows(decoded: Mapping[str, Json]) -> list[Row]:
    """Return a bar for each result of `bench decode`, the base's (without acceptance) in grey."""
    rows = []
    for name, result in decoded.items():
        middle, *ends = (result["decode_tok_s"][key] for key in ("median", "min", "max"))
        colour = MTP_COLOUR if result["acceptance"] else BASE_COLOUR
        rows.append(Row(name, middle, number(middle), colour, ends))
    return rows


# Charts: plain numbers in, PNG bytes out


def row_chart(title: str, rows: Sequence[Row], *, shares: bool = False) -> bytes:
    """Draw horizontal bars from 0 on, or dots for shares, on the part of the axis that matters."""
    with _figure(title, 0.6 + 0.3 * len(rows)) as figure:
        axes = figure.subplots()
        for y, row in enumerate(rows):
            if shares:
                axes.plot(row.value, y, "o", markersize=6, color=row.colour)
            else:
                axes.barh(y, row.value, height=0.6, color=row.colour)
            if row.interval:
                axes.plot(row.interval, [y, y], "|-", color=row.colour if shares else "black")
            axes.text(1.01, y, row.label, va="center", transform=axes.get_yaxis_transform())
        axes.margins(x=0.15 if shares else 0.03)
        axes.set(yticks=range(len(rows)), yticklabels=[row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.xaxis.set_major_locator(MaxNLocator(6) if shares else NullLocator())
        axes.grid(shares, axis="x")
        return _png(figure)


def acceptance_chart(heads: Sequence[Json]) -> bytes:
    """Draw how often each head's first draft of a step is accepted, as `head_acceptance` says."""
    keys = ("acceptance_by_position", "acceptance_by_position_interval")
    rows = []
    for head in heads:
        name, served, offline = head["name"], head["served"], head["offline"]
        found = {"served": [served[key][0] for key in keys]} if served else {}
        found |= {"offline": [offline["top1"], offline["interval"]]} if offline else {}
        for where, (rate, interval) in found.items():
            colour = HEAD_COLOURS.get(name, _OTHER_COLOUR)
            rows.append(Row(f"{name}, {where}", rate, percent(rate), colour, interval))
    title = "First draft of a step: share accepted, with 95 % intervals"
    return row_chart(title, rows, shares=True)


def sweep_chart(points: Sequence[Json]) -> bytes:
    """Draw tokens a second, of all requests and of one; `points` are sorted by concurrency."""
    panels = {"aggregate_tok_s": "all requests together", "per_stream_tok_s": "each request"}
    counts = sorted({point["concurrency"] for point in points})
    with _figure("Decode speed under load, tokens a second", 2.8) as figure:
        for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for k in dict.fromkeys(point["k"] for point in points):
                of_k = [p for p in points if p["k"] == k and p[key] is not None]
                xs, ys = [p["concurrency"] for p in of_k], [p[key] for p in of_k]
                colour = _K_COLOURS.get(k, _OTHER_COLOUR)
                axes.plot(xs, ys, "o-", color=colour, markersize=4, label=f"k = {k}")
            axes.set_title(title, fontweight="bold")
            axes.set(xlabel="concurrency", xticks=counts, ylim=(0, None))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.grid(axis="y")
            axes.legend(loc="lower right")
        return _png(figure)


@contextmanager
def _figure(title: str, height: float) -> Iterator[Figure]:
    """Give a figure in our style, whatever the user's matplotlibrc says; restore that after."""
    with style.context(["default", Path(__file__).parent / "templates/charts.mplstyle"]):
        figure = Figure(figsize=(6.0, height), dpi=200)
        figure.suptitle(title, x=0.012, ha="left", fontsize=10.0, fontweight="bold")
        yield figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # matplotlib's version would change the bytes without changing the picture.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
