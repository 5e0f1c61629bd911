"""The report as one HTML file that needs nothing else: no network, no other file, no library.

Sentences and tables are the Markdown report's, converted; pictures are its PNG charts, inlined.
What only a page can show is added: every recorded token, and the two servers' answers replayed.
Texts of a model can hold anything: they are escaped, control characters are made visible, and the
page's policy lets no script run but its own, nor load anything.
"""

import hashlib
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from markupsafe import Markup, escape

from mtp_graft.bench.charts import BASE_COLOUR, MTP_COLOUR
from mtp_graft.bench.decode import Timed
from mtp_graft.bench.markdown import NOTHING, percent, visible
from mtp_graft.bench.recorded import Piece, Recording, base_pieces, mtp_pieces

_TEMPLATES = "templates"
#: What our Markdown uses. Links, references and raw HTML are not among it, and stay text.
_RULES = ("table", "fence", "list", "backticks", "emphasis", "image", "escape")
#: What the running acceptance spans in a strip (strips.html), whose x counts tokens.
_LINE_HEIGHT = 60.0


def render_page(
    title: str,
    sections: Mapping[str, str],
    pictures: Mapping[str, bytes],
    recordings: Sequence[Recording],
    *,
    figures_in: str,
) -> str:
    """Return the page: `sections` (heading -> Markdown) in order, the figures at one's end.

    A section without a heading opens the page. The same arguments give the same text.
    """
    environment = Environment(
        loader=PackageLoader("mtp_graft.bench", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _asset("report.js")
    converter = MarkdownIt("zero", renderer_cls=_Renderer).enable(list(_RULES))

    def to_html(text: str) -> Markup:
        return Markup(converter.render(text, {"pictures": pictures}))

    both = [recording for recording in recordings if recording.base is not None]
    return environment.get_template("report.html").render(
        title=title,
        sections=[
            {"id": _slug(heading), "heading": heading, "body": to_html(text)}
            for heading, text in sections.items()
        ],
        figures_in=figures_in,
        style=_asset("report.css"),
        script=script,
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colours={"own": BASE_COLOUR, "draft": MTP_COLOUR},
        strips=[_strip(recording) for recording in recordings],
        replay=[_replay(recording) for recording in both],
        marks={mark for recording in both for mark in _marks(recording)},
    )


def _slug(heading: str) -> str:
    return heading.lower().replace(" ", "-") or "summary"


def _asset(name: str) -> Markup:
    """Return a file that is inlined as it is."""
    return Markup((files("mtp_graft.bench") / _TEMPLATES / name).read_text(encoding="utf-8"))


# Markdown to HTML


class _Renderer(RendererHTML):
    """Writes HTML; pictures are looked up in the environment's `pictures`, and nowhere else."""

    def image(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> Markup:
        name, alt = tokens[idx].attrs["src"], tokens[idx].content
        if name not in env["pictures"]:
            return escape(f"![{alt}]({name})")
        data = b64encode(env["pictures"][name]).decode()
        return Markup('<img class="chart" alt="{}" src="data:image/png;base64,{}">').format(
            alt, data
        )

    def table_open(self, *_: object) -> str:
        return '<div class="scroll" role="region" aria-label="table" tabindex="0"><table>\n'

    def table_close(self, *_: object) -> str:
        return "</table></div>\n"


# Acceptance over tokens


def _strip(recording: Recording) -> dict[str, Any]:
    """Return what the template draws of one answer: steps with their cells, and the line."""
    done, known = recording.mtp.completion, recording.account
    steps, start = [], 0
    for number, ((_, size), text) in enumerate(zip(done.chunks, done.texts, strict=True)):
        drafts = None if known is None else min(size, known.accepted[number])
        cells = [size] if known is None else [1] * size
        steps.append(
            {
                "title": _describe_step(number, start, size, drafts, visible(text)),
                "cells": [
                    {"x": start + at, "width": width, "kind": _kind(at, drafts)}
                    for at, width in enumerate(cells)
                ],
            }
        )
        start += size
    counted = recording.mtp.counters
    return {
        "id": visible(recording.id),
        "known": known is not None,
        "num_tokens": start,
        "steps": steps,
        "line": _line(recording),
        "acceptance": percent(counted.acceptance) if counted else NOTHING,
        "accepted": counted.num_accepted_tokens if counted else 0,
        "drafted": counted.num_draft_tokens if counted else 0,
    }


def _kind(place: int, drafts: int | None) -> str:
    return "chunk" if drafts is None else "draft" if place < drafts else "own"


def _describe_step(number: int, start: int, size: int, drafts: int | None, text: str) -> str:
    where = f"token {start + 1}" if size == 1 else f"tokens {start + 1} to {start + size}"
    if drafts is None:
        what = f"chunk of {size}"
    elif number == 0:
        what = "prefill"
    else:
        what = f"{drafts} accepted, {size - drafts} of the step's own"
    return f"{where} ({what}): “{text}”"


def _line(recording: Recording) -> str:
    """Return the SVG path of the running acceptance, level over each step's tokens."""
    if recording.account is None:
        return ""
    parts: list[str] = []
    x = 1  # after the token of prefill
    sizes = [size for _, size in recording.mtp.completion.chunks]
    for size, rate in zip(sizes[1:], recording.account.running, strict=True):
        parts.append(f"{'L' if parts else 'M'}{x} {_LINE_HEIGHT * (1 - rate):.2f}H{x + size}")
        x += size
    return "".join(parts)


# Side by side


def _replay(recording: Recording) -> dict[str, Any]:
    """Return what the script replays of one prompt; times in seconds from the request."""
    assert recording.base is not None, "both sides are there"
    known = recording.account
    return {
        "id": visible(recording.id),
        "divergence": recording.divergence,
        "base": {"steps": _steps(recording.base, base_pieces(recording)), "drafts": None},
        "mtp": {
            "steps": _steps(recording.mtp, mtp_pieces(recording)),
            "drafts": known and {"accepted": known.accepted, "each": known.drafts_per_step},
        },
    }


def _marks(recording: Recording) -> Iterator[str]:
    """Yield how the texts of one prompt are marked, so that the legend explains no more."""
    for parts in (*base_pieces(recording), *mtp_pieces(recording)):
        for piece in parts:
            yield piece.kind
            if not piece.shared:
                yield "apart"


def _steps(timed: Timed, pieces: Sequence[Sequence[Piece]]) -> list[dict[str, Any]]:
    return [
        {
            "at": round(arrived, 6),
            "tokens": size,
            "pieces": [[visible(p.text), p.kind, p.shared] for p in parts],
        }
        for (arrived, size), parts in zip(timed.completion.chunks, pieces, strict=True)
    ]
