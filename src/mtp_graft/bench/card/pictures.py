"""The card's charts, in the report's style, large enough to be read at 400 pixels."""

from collections.abc import Mapping, Sequence

from mtp_graft.bench.card.collect import EVALS, CardInputs, Measurement, by_environment
from mtp_graft.bench.card.quality import TITLES
from mtp_graft.bench.card.speed import label, sides
from mtp_graft.bench.charts import (
    BAR_COLOUR,
    BASE_COLOUR,
    INK,
    MTP_COLOUR,
    _figure,
    _finish_bars,
    _label_at_right,
    _percent,
    _png,
    _whisker,
    acceptance_chart,
)
from mtp_graft.bench.results import first_draft, walked
from mtp_graft.bench.sweep_chart import sweep_chart

_ROW = 0.36  # inches


def draw(inputs: CardInputs) -> dict[str, bytes]:
    """Return the charts that there are numbers for, by file name; one device to a chart."""
    drawn: dict[str, bytes] = {}
    for number, (_, group) in enumerate(by_environment(inputs.of("decode", "pipeline"))):
        drawn[chart_name("decode", number)] = _decode_chart(group)
    for measurement in inputs.of("sweep"):
        drawn[sweep_name(measurement)] = sweep_chart(measurement.result["points"].value)
    for number, (_, group) in enumerate(by_environment(inputs.of("workload"))):
        drawn[chart_name("workload", number)] = _workload_chart(group)
    for number, (_, group) in enumerate(by_environment(inputs.of(*EVALS))):
        drawn[chart_name("scores", number)] = _score_chart(group)
    scored = inputs.stages["score"]["acceptance"] if "score" in inputs.stages else None
    served = {v: first_draft(n.value) for v, n in inputs.served.items()}
    offline = {v: walked(n.value) for v, n in (scored.items() if scored else ())}
    if served or offline:
        drawn["acceptance.png"] = acceptance_chart(served, offline)
    return drawn


def chart_name(what: str, number: int) -> str:
    """Return the file name of the chart of the `number`th device."""
    return f"{what}.png" if number == 0 else f"{what}-{number + 1}.png"


def sweep_name(measurement: Measurement) -> str:
    """Return the file name of a sweep's chart."""
    return f"sweep-{measurement.profile}.png" if measurement.profile else "sweep.png"


def _decode_chart(group: Sequence[Measurement]) -> bytes:
    """Draw decode speeds: the median of the rounds, with whiskers to the extremes."""
    bars = [
        (f"{label(m)}, {name}", result["decode_tok_s"].value, name != "base")
        for m in group
        for name, result in sides(m)
    ]
    title = "Decode speed, one stream, tokens a second"
    with _figure(title, 0.5 + _ROW * len(bars)) as figure:
        axes = figure.subplots()
        for row, (_, speed, ours) in enumerate(bars):
            colour = MTP_COLOUR if ours else BASE_COLOUR
            axes.barh(row, speed["median"], height=0.62, color=colour)
            _whisker(axes, speed["min"], speed["max"], row, INK)
            axes.annotate(
                f"{speed['median']:,.1f}", (speed["max"], row), (6, 0), va="center",
                textcoords="offset points", fontweight="bold",
            )  # fmt: skip
        longest = max(speed["max"] for _, speed, _ in bars)
        _finish_bars(axes, [name for name, *_ in bars], longest, room=1.15)
        return _png(figure)


def _workload_chart(group: Sequence[Measurement]) -> bytes:
    """Draw the mean decode speed of every category."""
    bars = {
        f"{label(m)}, {category}": found["decode_tok_s"].value
        for m in group
        for category, found in [*m.result["categories"].items(), ("all", m.result)]
        if found["decode_tok_s"].value is not None
    }
    return _bars("Everyday requests, tokens a second", bars, "{:,.1f}")


def _bars(title: str, bars: Mapping[str, float], text: str) -> bytes:
    with _figure(title, 0.5 + 0.8 * _ROW * max(1, len(bars))) as figure:
        axes = figure.subplots()
        for row, value in enumerate(bars.values()):
            axes.barh(row, value, height=0.62, color=BAR_COLOUR)
            axes.annotate(
                text.format(value), (value, row), (5, 0), va="center",
                textcoords="offset points", fontweight="bold",
            )  # fmt: skip
        _finish_bars(axes, list(bars), max(bars.values(), default=1.0), room=1.15)
        return _png(figure)


def _score_chart(group: Sequence[Measurement]) -> bytes:
    """Draw the scores from 0 to 100 %, with their intervals and sample sizes."""
    with _figure("Share of right answers, with 95 % intervals", 0.7 + _ROW * len(group)) as figure:
        axes = figure.subplots()
        for row, measurement in enumerate(group):
            result = measurement.result.value
            axes.barh(row, result["score"], height=0.62, color=BAR_COLOUR)
            low, high = result["interval"]
            _whisker(axes, low, high, row, INK)
            shown = f"{100 * result['score']:.1f} %  ({result['correct']} of {result['total']})"
            _label_at_right(axes, shown, row, weight="bold")
        _finish_bars(axes, [TITLES[m.benchmark] for m in group], 1.0, room=1.0)
        axes.spines["bottom"].set_visible(True)
        axes.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
        axes.xaxis.set_major_formatter(_percent())
        axes.grid(axis="x")
        return _png(figure)
