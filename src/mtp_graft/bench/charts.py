"""The report's charts: PNG files in one style, drawn without a display and without global state.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Files are 640 points wide
at twice the density, and the same data gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#E69F00", "#009E73", "#9AA0A6", "#202124"
#: One colour a head, in every chart.
VARIANT_COLOURS: Mapping[str, str] = {
    "rtn": GREY,
    "gptq": BLUE,
    "mxfp4": ORANGE,
    "bf16": GREEN,
}
_WIDTH_IN, _DPI = 6.4, 200


def draw_acceptance(
    path: Path,
    offline: Mapping[str, tuple[float, float, float]],
    served: Mapping[str, tuple[float, float, float]],
) -> None:
    """Draw rate, low and high (0..1) of every head, offline beside served."""
    figure, axes = _figure(2.9)
    names = list(offline or served)
    for column, (label, rates, marker) in enumerate(
        (("offline", offline, "o"), ("served", served, "s"))
    ):
        for row, name in enumerate(names):
            if name not in rates:
                continue
            rate, low, high = (100 * value for value in rates[name])
            y = row + (column - 0.5) * 0.34
            colour = VARIANT_COLOURS.get(name, INK)
            face = "white" if label == "offline" else colour
            axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(rate, y, marker, color=colour, markerfacecolor=face, markersize=7)
            axes.annotate(
                f"{rate:.1f} %  {label}",
                (high, y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.35 * (high - low))  # room for the labels
    axes.set_xlabel("drafts accepted, % (bars: 95 % interval)")
    axes.tick_params(axis="y", length=0)
    _save(figure, path)


def draw_decode_speed(path: Path, speeds: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the median of each server's decode speed in tok/s, with the least and the most."""
    figure, axes = _figure(1.6)
    for row, speed in enumerate(speeds.values()):
        median, least, most = speed["median"], speed["min"], speed["max"]
        axes.barh(row, median, color=BLUE if row else GREY, height=0.55)
        axes.plot([least, most], [row, row], color=INK, linewidth=1.2)
        axes.annotate(
            f"{median:.1f}",
            (max(most, median), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(speeds)), list(speeds))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(speed["max"] for speed in speeds.values()))
    axes.set_xlabel("decoded tokens a second, one stream (line: least to most of the rounds)")
    axes.tick_params(axis="y", length=0)
    _save(figure, path)


def draw_expert_errors(path: Path, errors: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw the relative errors of every expert matrix, one panel a matrix.

    `errors` is head -> matrix -> one error an expert. Experts are sorted by the first head's.
    """
    matrices = list(next(iter(errors.values())))
    figure = Figure(figsize=(_WIDTH_IN, 2.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    for panel, matrix in zip(panels, matrices, strict=True):
        order = np.argsort(next(iter(errors.values()))[matrix])
        for name, of_matrix in errors.items():
            values = 100 * np.asarray(of_matrix[matrix])[order]
            colour = VARIANT_COLOURS.get(name, INK)
            label = f"{name}, mean {values.mean():.1f} %"
            panel.plot(values, ".", color=colour, markersize=4, label=label)
        _style(panel)
        panel.set_title(matrix, loc="left", fontsize=10, color=INK)
        panel.legend(frameon=False, fontsize=7, handletextpad=0.2, loc="best")
    largest = max(max(values) for of_matrix in errors.values() for values in of_matrix.values())
    panels[0].set_ylim(0, 108 * largest)  # shared by the panels
    panels[0].set_ylabel("error, %")
    figure.supxlabel("experts, sorted", fontsize=9, color=INK)
    _save(figure, path)


def draw_tokens_per_expert(path: Path, counts: Sequence[int]) -> None:
    """Draw how many calibration tokens reached each expert, the busiest first."""
    figure, axes = _figure(2.0)
    ordered = sorted(counts, reverse=True)
    axes.bar(range(len(ordered)), ordered, color=BLUE, width=0.85)
    mean = sum(ordered) / len(ordered)
    axes.axhline(mean, color=INK, linewidth=1)
    axes.annotate(
        f"mean {mean:,.0f}",
        (len(ordered) - 1, mean),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    axes.set_xlabel(f"{len(ordered)} experts, the busiest first")
    axes.set_ylabel("tokens")
    axes.set_xlim(-1, len(ordered))
    _save(figure, path)


def draw_stage_seconds(path: Path, seconds: Mapping[str, float]) -> None:
    """Draw the time of each stage."""
    figure, axes = _figure(0.5 + 0.28 * len(seconds))
    axes.barh(range(len(seconds)), list(seconds.values()), color=GREY, height=0.6)
    for row, value in enumerate(seconds.values()):
        axes.annotate(
            f"{value:.1f} s",
            (value, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(seconds.values()))
    axes.set_xlabel("seconds")
    axes.tick_params(axis="y", length=0)
    _save(figure, path)


def _figure(height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _style(axes)
    return figure, axes


def _style(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
    temporary.rename(path)
