"""How the report writes numbers, and the Markdown it is made of."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line uses this module without charts
    from mtp_graft.bench.charts import Rate

NOT_MEASURED = "not measured"
NOTHING = "–"


def not_measured(what: str) -> str:
    """Say that a part of the report has no numbers."""
    return f"{what} was not measured in this run."


def percent(rate: float | None) -> str:
    """Write a rate."""
    return NOTHING if rate is None else f"{100 * rate:.1f} %"


def percents(rates: Sequence[float | None] | None) -> str:
    """Write several rates, as 74.2, 66.3 %."""
    if not rates:
        return NOTHING
    return ", ".join(NOTHING if r is None else f"{100 * r:.1f}" for r in rates) + " %"


def points(offline: float | None, served: float | None) -> str:
    """Write by how many points of a percent `served` lies above `offline`."""
    if offline is None or served is None:
        return NOTHING
    difference = round(100 * (served - offline), 1) + 0.0  # no minus before a zero
    return f"{difference:+.1f} points".replace("-", "−")


def interval(rate: "Rate") -> str:
    """Write a rate's interval; nothing if it has none."""
    if rate.interval is None:
        return ""
    low, high = rate.interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def drafts(rate: "Rate") -> str:
    """Write how many drafts a rate was counted on."""
    return NOT_MEASURED if rate.drafts is None else f"{rate.accepted:,} of {rate.drafts:,}"


def number(value: float | None) -> str:
    """Write a number that may not have been measured."""
    return NOT_MEASURED if value is None else f"{value:,.1f}"


def spread(found: Mapping[str, float]) -> str:
    """Write a median with its extremes."""
    return f"{found['median']:,.1f} ({found['min']:,.1f} to {found['max']:,.1f})"


def rate_spread(found: Mapping[str, float] | None) -> str:
    """Write the median of rates with its extremes."""
    if found is None:
        return NOTHING
    low, high = 100 * found["min"], 100 * found["max"]
    return f"{percent(found['median'])} ({low:.1f} to {high:.1f} %)"


def yes_no(value: bool | None) -> str:
    """Write a flag that may not have been seen."""
    return NOT_MEASURED if value is None else "yes" if value else "no"


def count(how_many: int, what: str) -> str:
    """Write a number of things."""
    return f"{how_many:,} {what}{'' if how_many == 1 else 's'}"


def image(name: str, alt: str) -> str:
    """Return a Markdown picture."""
    return f"![{alt}]({name})"


def bullets(lines: Sequence[str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Return a Markdown table; `align` has l or r for every column."""
    rules = ["---:" if side == "r" else "---" for side in align]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, rules, *escaped])


def visible(text: str) -> str:
    """Return a text of anybody's with signs for what no file or page should have in it.

    Control characters but line feed and tab become the signs of their names, lone surrogates and
    C1 controls U+FFFD. Every character stays one character.
    """
    return text.translate(_SIGNS)


_SIGNS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD),
}
