"""The report's charts: plain numbers in, PNG bytes out, the same bytes for the same numbers.

A variant keeps its colour in every chart (Okabe and Ito's palette, safe for colour-blind readers).
Values are written where they are drawn, so there are no legends to look up. Charts are 6 inches
wide: 600 pixels on a page, stored with twice as many.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

DPI = 200
WIDTH = 6.0  # inches
INK, FAINT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
COLOURS = {"rtn": "#d55e00", "gptq": "#0072b2", "mxfp4": "#009e73", "bf16": "#5c5c5c"}
BASE_COLOUR, MTP_COLOUR, BAR_COLOUR = "#bdbdbd", "#56b4e9", "#7aa6c2"

_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same glyphs everywhere
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.0,
    "axes.edgecolor": "#b0b0b0",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Rate:
    """How many first drafts of a step were accepted; what was not counted is None."""

    rate: float
    interval: tuple[float, float] | None = None  # 95 %
    accepted: int | None = None
    drafts: int | None = None


def acceptance_chart(served: Mapping[str, Rate], offline: Mapping[str, Rate]) -> bytes:
    """Draw the acceptance of every variant, served above offline, with 95 % intervals."""
    variants = in_order({**served, **offline})
    rates = [*served.values(), *offline.values()]
    edges = [edge for rate in rates for edge in rate.interval or (rate.rate, rate.rate)]
    # Differences are points of a percent, so dots (which need no zero) on the part that matters.
    margin = max(0.02, 0.15 * (max(edges) - min(edges)))
    with _figure(
        "First draft of a step: accepted, with 95 % intervals", 0.95 + 0.52 * len(variants)
    ) as figure:
        axes = figure.subplots()
        for row, variant in enumerate(variants):
            apart = 0.17 if variant in served and variant in offline else 0.0
            for name, found, offset in (("served", served, -apart), ("offline", offline, apart)):
                if variant in found:
                    _draw_rate(axes, found[variant], row + offset, COLOURS[variant], name)
        axes.set_xlim(max(0.0, min(edges) - margin), min(1.0, max(edges) + margin))
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_yticks(range(len(variants)), variants)
        _name_rows(axes, 9.5)
        axes.xaxis.set_major_formatter(_percent())
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        return _png(figure)


def error_chart(
    rel_errors: Mapping[str, Mapping[str, Sequence[float]]], counts: Sequence[int]
) -> bytes:
    """Draw every expert's error by matrix; experts go from the most tokens to the fewest.

    `rel_errors` has variants, then matrices, then a number an expert.
    """
    variants = in_order(rel_errors)
    matrices = list(rel_errors[variants[0]])
    order = sorted(range(len(counts)), key=lambda expert: -counts[expert])
    highest = max(max(values) for by in rel_errors.values() for values in by.values())
    size = 9.0 if len(order) <= 100 else 4.0
    title = "Hessian-weighted relative error of each expert, and the mean"
    with _figure(title, 2.7) as figure:
        panels = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
        for axes, matrix in zip(panels, matrices, strict=True):
            means = {}
            for variant in variants:
                values = [rel_errors[variant][matrix][expert] for expert in order]
                means[variant] = sum(values) / len(values)
                colour = COLOURS[variant]
                axes.scatter(range(len(values)), values, s=size, color=colour, linewidths=0)
                axes.axhline(means[variant], color=colour, linewidth=1.0, alpha=0.6)
            _label_means(axes, means, 1.12 * highest)
            axes.set_ylim(0, 1.12 * highest)
            axes.set_title(matrix, loc="left", color=INK, fontweight="bold")
            axes.set_xticks([])
            axes.grid(axis="y")
        panels[0].yaxis.set_major_formatter(_percent())
        panels[0].yaxis.set_major_locator(MaxNLocator(5))
        figure.supxlabel(
            f"{len(order)} experts, from the most calibration tokens to the fewest",
            fontsize=8.5,
            color=FAINT,
        )
        return _png(figure)


def token_chart(counts: Sequence[int]) -> bytes:
    """Draw the calibration tokens of every expert, from the most to the fewest, and their mean."""
    ordered = sorted(counts, reverse=True)
    mean = sum(ordered) / len(ordered)
    zero = ordered.count(0)
    top = 1.15 * max(1, ordered[0])
    with _figure("Calibration tokens of each expert, sorted", 2.3) as figure:
        axes = figure.subplots()
        axes.bar(range(len(ordered)), ordered, width=0.8, color=BAR_COLOUR, linewidth=0)
        axes.axhline(mean, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        fewest = f"{zero} with none" if zero else f"fewest {ordered[-1]:,}"
        labels = {f"mean {mean:,.1f}": mean, fewest: float(ordered[-1])}
        for label, y in _moved_apart(labels, 0.12 * top).items():
            _label_at_right(axes, label, y)
        axes.annotate(
            f"most {ordered[0]:,}", (-0.4, ordered[0]), (0, 3), fontsize=8.5,
            textcoords="offset points", va="bottom",
        )  # fmt: skip
        axes.set_xlim(-0.7, len(ordered) - 0.3)
        axes.set_ylim(0, top)
        axes.set_xticks([])
        axes.set_xlabel(f"{len(ordered)} experts")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        return _png(figure)


def decode_chart(base: Mapping[str, float], mtp: Mapping[str, float]) -> bytes:
    """Draw both decode speeds: the median of the rounds, with whiskers to the extremes."""
    ratio = f"   {mtp['median'] / base['median']:.2f}× base"
    rows = [("base", base, BASE_COLOUR, ""), ("with MTP", mtp, MTP_COLOUR, ratio)]
    title = "Decode speed, tokens a second: median, slowest and fastest round"
    with _figure(title, 1.45) as figure:
        axes = figure.subplots()
        for row, (_, speed, colour, remark) in enumerate(rows):
            axes.barh(row, speed["median"], height=0.56, color=colour)
            _whisker(axes, speed["min"], speed["max"], row, INK)
            axes.annotate(
                f"{speed['median']:,.1f}{remark}", (speed["max"], row), (6, 0), va="center",
                textcoords="offset points", fontweight="bold",
            )  # fmt: skip
        _finish_bars(axes, [name for name, *_ in rows], max(base["max"], mtp["max"]), room=1.3)
        return _png(figure)


def stage_chart(seconds: Mapping[str, float]) -> bytes:
    """Draw the time that every stage took, in the order given."""
    with _figure("Time of each stage, seconds", 0.6 + 0.22 * len(seconds)) as figure:
        axes = figure.subplots()
        for row, value in enumerate(seconds.values()):
            axes.barh(row, value, height=0.62, color=BAR_COLOUR)
            axes.annotate(
                f"{value:,.1f}", (value, row), (4, 0), textcoords="offset points", va="center",
                fontsize=8.5,
            )  # fmt: skip
        _finish_bars(axes, list(seconds), max(seconds.values()))
        return _png(figure)


def in_order(variants: Mapping[str, object]) -> list[str]:
    """Return the variants in the colours' order."""
    return sorted(variants, key=list(COLOURS).index)


# Parts of a chart


@contextmanager
def _figure(title: str, height: float) -> Iterator[Figure]:
    """Give a figure in our style, whatever the user's matplotlibrc says; restore that after."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        figure.suptitle(title, x=0.012, ha="left", fontsize=10.0, fontweight="bold")
        yield figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # The version of the software would make the bytes change without the picture changing.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_rate(axes: Axes, rate: Rate, y: float, colour: str, name: str) -> None:
    low, high = rate.interval or (rate.rate, rate.rate)
    if rate.interval is not None:
        _whisker(axes, low, high, y, colour)
    face = colour if name == "served" else "white"
    axes.plot(rate.rate, y, "o", markersize=6, color=colour, markerfacecolor=face, zorder=3)
    _label_at_right(axes, f"{100 * rate.rate:.1f} % {name}", y)


def _whisker(axes: Axes, low: float, high: float, y: float, colour: str) -> None:
    axes.plot([low, high], [y, y], color=colour, linewidth=1.4, solid_capstyle="butt")
    axes.plot([low, high], [y, y], "|", color=colour, markersize=6, markeredgewidth=1.4)


def _label_means(axes: Axes, means: Mapping[str, float], top: float) -> None:
    for variant, y in _moved_apart(means, 0.17 * top).items():
        label = f"{variant}\n{100 * means[variant]:.2f} %"
        _label_at_right(axes, label, y, COLOURS[variant], "bold")


def _moved_apart(positions: Mapping[str, float], gap: float) -> dict[str, float]:
    """Return the labels' positions, raised where they would touch the label below."""
    moved: dict[str, float] = {}
    for label in sorted(positions, key=lambda label: positions[label]):
        below = max(moved.values(), default=-gap)
        moved[label] = max(positions[label], below + gap)
    return moved


def _label_at_right(
    axes: Axes, label: str, y: float, colour: str = INK, weight: str = "normal"
) -> None:
    """Write beside the plot, at a height of its y axis."""
    axes.annotate(
        label, (1, y), (5, 0), va="center", xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", fontsize=8.5, color=colour, fontweight=weight,
        annotation_clip=False,
    )  # fmt: skip


def _percent() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{100 * value:g} %")


def _finish_bars(axes: Axes, names: Sequence[str], longest: float, room: float = 1.12) -> None:
    """Name the rows of a bar chart; values stand at the bars, so there is no axis of numbers."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, room * longest if longest else 1.0)
    _name_rows(axes, 9.0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _name_rows(axes: Axes, size: float) -> None:
    axes.tick_params(axis="y", labelsize=size, labelcolor=INK)
