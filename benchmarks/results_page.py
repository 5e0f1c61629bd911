"""Write docs/results.md, and the table of README.md, from the files in benchmarks/results.

    python benchmarks/results_page.py [--check]

The words are in benchmarks/pages/*.j2; every figure is read from a result file, so none can be
mistyped or outlive the file that it came from. --check writes nothing and fails if the pages are
not what the files say; the tests do that.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jinja2

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "pages"
BEGIN, END = "<!-- written by benchmarks/results_page.py -->\n", "<!-- end -->\n"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def interval(bounds: list[float], digits: int = 1) -> str:
    """Return shares as `78.7 to 81.8 %`."""
    low, high = bounds
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f} %"


def points(difference: float) -> str:
    """Return a difference of shares in points, with its sign."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def ratio(bounds: list[float]) -> str:
    low, high = bounds
    return f"{low:.2f} to {high:.2f}"


def number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def result(name: str) -> Any:
    """Return the result file of that name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def pages() -> dict[Path, str]:
    """Return what the pages should be."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    filters = (percent, interval, points, ratio, number)
    environment.filters |= {each.__name__: each for each in filters}
    environment.globals |= {"result": result, "source": source}
    readme = (ROOT / "README.md").read_text()
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = environment.get_template("readme.md.j2").render()
    return {
        ROOT / "README.md": before + BEGIN + table + END + after,
        ROOT / "docs" / "results.md": environment.get_template("results.md.j2").render(),
    }


def source(name: str) -> str:
    """Return a link from docs/ to a result file."""
    assert (RESULTS / f"{name}.json").exists(), name
    return f"[`{name}`](../benchmarks/results/{name}.json)"


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


if __name__ == "__main__":
    main()
