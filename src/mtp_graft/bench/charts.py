"""The charts of report and card: plain numbers in, PNG bytes out.

A head keeps its colour in every chart (Okabe and Ito's palette, safe for colour-blind readers).
Charts are 6 inches wide: 600 pixels on a page, stored with twice as many. The same numbers give the
same bytes.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, StrMethodFormatter

Json = Mapping[str, Any]

INK, FAINT = "#222222", "#6b6b6b"
HEAD_COLOURS = {"rtn": "#d55e00", "gptq": "#0072b2", "mxfp4": "#009e73", "bf16": "#5c5c5c"}
BASE_COLOUR, MTP_COLOUR, BAR_COLOUR = "#bdbdbd", "#56b4e9", "#7aa6c2"
#: By number of drafts a step.
_K_COLOURS = {0: BASE_COLOUR, 1: "#0072b2", 2: "#d55e00", 3: "#009e73", None: MTP_COLOUR}
_OTHER_COLOUR = "#cc79a7"

_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g} %")
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same glyphs everywhere
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#b0b0b0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart: its value, the text beside it, and the ends of its whisker."""

    name: str
    value: float
    label: str
    colour: str = BAR_COLOUR
    whisker: tuple[float, float] | None = None


def bar_chart(title: str, bars: Sequence[Bar], limit: float | None = None) -> bytes:
    """Draw horizontal bars with their values beside them; `limit` is the end of the axis."""
    ends = [max((bar.value, *(bar.whisker or ()))) for bar in bars]
    end = limit or 1.25 * max([*ends, 1e-9])
    with _figure(title, 0.45 + 0.3 * len(bars)) as figure:
        axes = figure.subplots()
        for row, (bar, right) in enumerate(zip(bars, ends, strict=True)):
            axes.barh(row, bar.value, height=0.6, color=bar.colour)
            if bar.whisker:
                _whisker(axes, *bar.whisker, row, INK)
            _label(axes, bar.label, end if limit else right, row)
        axes.set_xlim(0, end)
        _name_rows(axes, [bar.name for bar in bars])
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return _png(figure)


def acceptance_chart(heads: Sequence[Json]) -> bytes:
    """Draw how often each head's first draft of a step is accepted, served and offline.

    `heads` is what `report.head_acceptance` returns.
    """
    dots = []  # (row, rate, interval, colour, label, filled)
    for row, head in enumerate(heads):
        colour = HEAD_COLOURS.get(head["name"], _OTHER_COLOUR)
        apart = 0.17 if head["served"] and head["offline"] else 0.0
        if served := head["served"]:
            rate = served["acceptance_by_position"][0]
            interval = served["acceptance_by_position_interval"][0]
            dots.append((row - apart, rate, interval, colour, "served", True))
        if offline := head["offline"]:
            dots.append(
                (row + apart, offline["top1"], offline["interval"], colour, "offline", False)
            )
    edges = [edge for _, _, interval, *_ in dots for edge in interval]
    # The differences are small, so dots, which need no zero, on the part that matters.
    margin = max(0.02, 0.15 * (max(edges) - min(edges)))
    title = "First draft of a step: share accepted, with 95 % intervals"
    with _figure(title, 0.85 + 0.5 * len(heads)) as figure:
        axes = figure.subplots()
        right = min(1.0, max(edges) + margin)
        for y, rate, (low, high), colour, name, filled in dots:
            _whisker(axes, low, high, y, colour)
            face = colour if filled else "white"
            axes.plot(rate, y, "o", markersize=6, color=colour, markerfacecolor=face, zorder=3)
            _label(axes, f"{100 * rate:.1f} % {name}", right, y)
        axes.set_xlim(max(0.0, min(edges) - margin), right)
        _name_rows(axes, [head["name"] for head in heads])
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        return _png(figure)


def error_chart(
    rel_errors: Mapping[str, Mapping[str, Sequence[float]]], counts: Sequence[int]
) -> bytes:
    """Draw every expert's error: `rel_errors` has heads, then matrices, then a number an expert.

    Experts go from the most calibration tokens to the fewest; `counts` are their tokens.
    """
    order = sorted(range(len(counts)), key=lambda expert: -counts[expert])
    matrices = list(next(iter(rel_errors.values())))
    with _figure("Hessian-weighted relative error of each expert, and the mean", 2.8) as figure:
        panels = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
        for axes, matrix in zip(panels, matrices, strict=True):
            for head, by_matrix in rel_errors.items():
                values, colour = [by_matrix[matrix][e] for e in order], HEAD_COLOURS[head]
                mean = sum(values) / len(values)
                size = 8.0 if len(order) <= 100 else 4.0
                axes.scatter(range(len(values)), values, s=size, color=colour, linewidths=0)
                axes.axhline(mean, color=colour, linewidth=1.0, label=f"{head} {100 * mean:.1f} %")
            axes.set_title(matrix, color=INK, fontweight="bold")
            axes.set_xticks([])
            axes.grid(axis="y")
            axes.legend(loc="lower left", handlelength=1.0)
        panels[0].set_ylim(0, None)
        panels[0].yaxis.set_major_formatter(_PERCENT)
        figure.supxlabel(
            f"{len(order)} experts, from the most calibration tokens to the fewest",
            fontsize=8.5,
            color=FAINT,
        )
        return _png(figure)


def token_chart(counts: Sequence[int]) -> bytes:
    """Draw the calibration tokens of every expert, sorted, and their mean."""
    ordered = sorted(counts, reverse=True)
    mean = sum(ordered) / len(ordered)
    with _figure("Calibration tokens of each expert, sorted", 2.2) as figure:
        axes = figure.subplots()
        axes.bar(range(len(ordered)), ordered, width=0.8, color=BAR_COLOUR, linewidth=0)
        axes.axhline(mean, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        _label(axes, f"mean {mean:,.0f}", len(ordered) - 0.3, mean)
        axes.set_xlim(-0.7, len(ordered) - 0.3)
        axes.set_xticks([])
        axes.set_xlabel(f"{len(ordered)} experts")
        _count_tokens(axes)
        return _png(figure)


def sweep_chart(points: Sequence[Json]) -> bytes:
    """Draw tokens a second over concurrency: of all requests together, and of one of them."""
    panels = (
        ("aggregate_tok_s", "aggregate_interval", "all requests together"),
        ("per_stream_tok_s", "per_stream_spread", "each request"),
    )
    with _figure("Decode speed under load, tokens a second", 2.8) as figure:
        for axes, (key, bounds, title) in zip(figure.subplots(1, 2), panels, strict=True):
            for k in dict.fromkeys(point.get("k") for point in points):
                of_k = [p for p in points if p.get("k") == k and p.get(key) is not None]
                of_k.sort(key=lambda point: point["concurrency"])
                xs, colour = [p["concurrency"] for p in of_k], _K_COLOURS.get(k, _OTHER_COLOUR)
                name = None if k is None else f"k = {k}"
                axes.plot(xs, [p[key] for p in of_k], "o-", color=colour, markersize=4, label=name)
                for point in of_k:
                    if point.get(bounds):
                        axes.vlines(point["concurrency"], *point[bounds], color=colour, alpha=0.6)
            axes.set_title(title, color=INK, fontweight="bold")
            axes.set_xlabel("concurrency")
            axes.set_xticks(sorted({point["concurrency"] for point in points}))
            axes.xaxis.set_minor_locator(NullLocator())
            _count_tokens(axes)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(loc="lower right")
        return _png(figure)


@contextmanager
def _figure(title: str, height: float) -> Iterator[Figure]:
    """Give a figure in our style, whatever the user's matplotlibrc says; restore that after."""
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(6.0, height), dpi=200)
        figure.suptitle(title, x=0.012, ha="left", fontsize=10.0, fontweight="bold")
        yield figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # matplotlib's version would change the bytes without changing the picture.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _whisker(axes: Axes, low: float, high: float, y: float, colour: str) -> None:
    axes.plot([low, high], [y, y], "|-", color=colour, linewidth=1.4, markersize=6, mew=1.4)


def _label(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(
        text, (x, y), (6, 0), textcoords="offset points", va="center", annotation_clip=False
    )


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", labelcolor=INK)


def _count_tokens(axes: Axes) -> None:
    axes.set_ylim(0, None)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y")
