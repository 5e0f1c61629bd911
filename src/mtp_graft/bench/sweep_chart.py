"""The sweep's chart, in the report's style: plain points in, PNG bytes out."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from mtp_graft.bench.charts import BASE_COLOUR, INK, _figure, _label_at_right, _moved_apart, _png

#: By number of speculative tokens; the base without a head is grey, as in the other charts.
_COLOURS = {0: BASE_COLOUR, 1: "#0072b2", 2: "#d55e00", 3: "#009e73"}
_HEIGHT = 2.9


def sweep_chart(points: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw tokens a second over the number of streams: of all streams, and of one of them."""
    with _figure("Decode speed under load, tokens a second", _HEIGHT) as figure:
        whole, each = figure.subplots(1, 2)
        _panel(whole, points, "aggregate_tok_s", "aggregate_interval", "all streams (95 %)")
        _panel(each, points, "per_stream_tok_s", "per_stream_spread", "one stream (extremes)")
        return _png(figure)


def _panel(
    axes: Axes, points: Sequence[Mapping[str, Any]], key: str, bounds: str, title: str
) -> None:
    """Draw one line for each k, with whiskers, named at its right end."""
    ends = {}
    streams = sorted({point["concurrency"] for point in points})
    for k in dict.fromkeys(point["k"] for point in points):
        of_k = [point for point in points if point["k"] == k and point[key] is not None]
        of_k.sort(key=lambda point: point["concurrency"])
        if not of_k:
            continue
        xs, ys = [p["concurrency"] for p in of_k], [p[key] for p in of_k]
        lows, highs = zip(*(p[bounds] for p in of_k), strict=True)
        colour = _colour(k)
        axes.vlines(xs, lows, highs, color=colour, linewidth=1.0, alpha=0.6)
        axes.plot(xs, ys, "o-", color=colour, markersize=4.5, linewidth=1.6)
        ends["" if k is None else f"k = {k}"] = ys[-1]
    axes.set_ylim(0, None)
    moved = _moved_apart(ends, 0.075 * axes.get_ylim()[1])
    # Labels move upwards only; put back by the mean, the group stands beside its lines.
    raised = sum(moved[label] - ends[label] for label in ends) / max(1, len(ends))
    for label, y in moved.items():
        k = int(label.removeprefix("k = ")) if label else None
        _label_at_right(axes, label, y - raised, _ink(k), "bold")
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.xaxis.set_major_locator(FixedLocator(streams))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("streams at a time")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y")


def _colour(k: int | None) -> str:
    return "#56b4e9" if k is None else _COLOURS.get(k, "#cc79a7")


def _ink(k: int | None) -> str:
    """Return a line's colour for its name; the base's grey is too pale for letters."""
    return INK if k == 0 else _colour(k)
