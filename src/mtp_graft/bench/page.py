"""How report and card are written: one Jinja environment, and the form of numbers in both."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtp_graft.errors import translated

NOTHING = "–"


def number(value: float | None, digits: int = 1) -> str:
    """Write a number; a dash where there is none."""
    return NOTHING if value is None else f"{float(value):,.{digits}f}"


def percent(rate: float | None, digits: int = 1) -> str:
    """Write a share, 0..1; a dash where there is none."""
    return NOTHING if rate is None else f"{100 * rate:.{digits}f} %"


def percents(rates: Sequence[float | None] | None, between: str = ", ") -> str:
    """Write several shares, as 74.2, 66.3 %; the ends of an interval with ` to ` between."""
    if not rates:
        return NOTHING
    return between.join(number(None if rate is None else 100 * rate) for rate in rates) + " %"


def spread(found: Mapping[str, float] | None, scale: float = 1, unit: str = "") -> str:
    """Write a `median` with its `min` and `max`."""
    if found is None:
        return NOTHING
    middle, low, high = (f"{scale * found[key]:,.1f}" for key in ("median", "min", "max"))
    return f"{middle}{unit} ({low} to {high}{unit})"


def points(difference: float) -> str:
    """Write a difference of shares in percentage points, with its sign."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("-", "−")


def counted(how_many: int, what: str) -> str:
    """Write a number of things."""
    return f"{int(how_many):,} {what}{'' if how_many == 1 else 's'}"


def as_html(text: str) -> str:
    """Return a text as HTML, with a sign for each character that a page must not have."""
    from markupsafe import escape

    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "�", text))


def as_markdown(text: str) -> str:
    """Return a text as Markdown on one line that shows it as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]<|])", r"\\\1", re.sub(r"\s+", " ", text))


def render(template: str, escape: Callable[[str], str], data: Mapping[str, Any]) -> str:
    """Return a page of `bench/templates`, every text in it escaped; GraftError if data lacks."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("mtp_graft.bench"),
        autoescape=True,  # what `finalize` returns is escaped already
        finalize=lambda value: Markup(escape(value)) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for write in (number, percent, percents, spread, points, counted):
        environment.filters[write.__name__] = write
    cure = "; it was made by another version of mtp-graft: run that stage or benchmark again"
    what = f"{template}: a result of the run is incomplete"
    with translated(what, UndefinedError, KeyError, then=cure):
        return environment.get_template(template).render(data)
