"""The page of a soak: one HTML file that needs no other."""

from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_graft.bench import charts
from mtp_graft.bench.page import as_html, render
from mtp_graft.checkpoint.files import write_text


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Write what `run.soak` returned; GraftError if the disk is full."""
    shown = {"drafts accepted": ("acceptance", 1), "memory, GiB": ("memory_bytes", 2**30)}
    panels = {
        name: [(p["at_s"] / 60, p[key] / unit) for p in result["over_time"] if p[key] is not None]
        for name, (key, unit) in shown.items()
    }
    panels = {name: points for name, points in panels.items() if points}
    chart = charts.time_chart("The server under load", panels) if panels else b""
    data = {**result, "chart": b64encode(chart).decode()}
    write_text(render("soak.html", as_html, data), path)
