"""Write docs/results.md and README.md's table and chart from the files in benchmarks/results.

    python benchmarks/results_page.py [--check]

The words are in benchmarks/pages/*.j2; every figure is read from a result file, so none can be
mistyped or outlive the file that it came from. --check writes nothing and fails if the pages are
not what the files say; the tests do that. The chart is not compared.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt

from mtp_graft.bench.page import percent, points

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "pages"
BEGIN, END = "<!-- written by benchmarks/results_page.py -->\n", "<!-- end -->\n"


def interval(bounds: list[float], digits: int = 1) -> str:
    """Return shares as `78.7 to 81.8 %`."""
    low, high = bounds
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f} %"


def ratio(bounds: list[float]) -> str:
    low, high = bounds
    return f"{low:.2f} to {high:.2f}"


def number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def result(name: str) -> Any:
    """Return the result file of that name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def source(name: str) -> str:
    """Return a link from docs/ to a result file."""
    assert (RESULTS / f"{name}.json").exists(), name
    return f"[`{name}`](../benchmarks/results/{name}.json)"


def pages() -> dict[Path, str]:
    """Return what the pages should be."""
    options = ("trim_blocks", "lstrip_blocks", "keep_trailing_newline")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        undefined=jinja2.StrictUndefined,
        **dict.fromkeys(options, True),
        autoescape=False,  # Markdown
    )
    filters = (percent, interval, points, ratio, number)
    environment.filters |= {each.__name__: each for each in filters}
    environment.globals |= {"result": result, "source": source}
    before, _, rest = (ROOT / "README.md").read_text().partition(BEGIN)
    table = environment.get_template("readme.md.j2").render()
    return {
        ROOT / "README.md": before + BEGIN + table + END + rest.partition(END)[2],
        ROOT / "docs" / "results.md": environment.get_template("results.md.j2").render(),
    }


def draw_speed(path: Path) -> None:
    """Draw the tiny model's tokens a second, and what Flash's step times let expect."""
    figure, (tiny, flash) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    colours = ["#8c959f", "#54aeff", "#8250df", "#0969da"]  # by k
    sweep = result("sweep_h200")["results"]
    for place, (name, k) in enumerate({"base": 0, "k1": 1, "k3": 3}.items(), start=-1):
        speeds = [point["aggregate_tok_s"] for point in sweep[name]]
        at, label = [i + 0.27 * place for i in range(len(speeds))], f"k = {k}" if k else "no head"
        bars = tiny.bar(at, speeds, 0.25, label=label, color=colours[k])
        tiny.bar_label(bars, fmt="{:,.0f}", fontsize=7, padding=2)
    counts = [point["concurrency"] for point in sweep["base"]]
    tiny.set_xticks(range(len(counts)), [f"{n} request{'s' * (n > 1)}" for n in counts])
    tiny.set_ylabel("tokens per second, all requests")
    tiny.set_title("Tiny model, real drafts, one H200, HTTP", fontsize=10)
    lines = result("step_time_two_h200")["results"]
    for k in (1, 2, 3):
        of_k = sorted((e for e in lines if e["k"] == k), key=lambda e: e["streams"])
        published = [sorted(e["published"].values()) for e in of_k]
        middle = [sum(both) / 2 for both in published]
        reach = [high - (low + high) / 2 for low, high in published]
        at, style = [i + 0.12 * (k - 2) for i in range(len(of_k))], {"fmt": "o", "capsize": 4}
        flash.errorbar(at, middle, reach, color=colours[k], label=f"k = {k}", **style)
        flash.set_xticks(range(len(of_k)), [e["streams"] for e in of_k])
    flash.axhline(1, color=colours[0], linewidth=1)
    flash.set_xlabel("requests at once")
    flash.set_ylabel("times the base's speed")
    flash.set_title("Flash's width, 43 layers, two H200: to expect", fontsize=10)
    for axes in (tiny, flash):
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date")
    options = parser.parse_args()
    stale = [path for path, text in pages().items() if path.read_text() != text]
    if options.check:
        if stale:
            sys.exit(f"{', '.join(path.name for path in stale)}: run {Path(__file__).name}")
        return
    for path, text in pages().items():
        path.write_text(text)
    draw_speed(ROOT / "docs" / "images" / "speed.png")


if __name__ == "__main__":
    main()
