"""The model card of a run: README.md and charts for the hub, and card.json with every origin.

    collect   the run folder's JSON, as nodes that know where they are
    cite      shows a node, and writes down what was shown and from where
    speed, quality, made, commands, metadata     the sections' tables and sentences
    pictures  the charts
    card.md.jinja                                the prose around them

No dates, no paths of this machine: the same results give the same bytes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import mtp_graft
from mtp_graft.bench.card import commands, made, metadata, pictures, quality, speed
from mtp_graft.bench.card.cite import Citations
from mtp_graft.bench.card.collect import CardInputs, by_environment, collect
from mtp_graft.bench.card.tables import Block
from mtp_graft.bench.markdown import image
from mtp_graft.bench.report import write_picture
from mtp_graft.checkpoint.shards import write_json, write_text
from mtp_graft.checkpoint.spliced import CARD_NAME, TRACE_NAME

_CHARTS = ("decode*.png", "sweep*.png", "workload*.png", "scores*.png", "acceptance.png")


def write_card(run: Path, out: Path) -> dict[str, Any]:
    """Write the card of a run to `out`: charts, `card.json`, and `README.md` last.

    Returns the JSON of `mtp-graft card`. Charts of an earlier card that this one has not are
    removed. Raises GraftError if the run has no checkpoint, for results that cannot be read, and
    for a full disk.
    """
    inputs, cite = collect(run), Citations()
    page = _page(inputs, cite)
    drawn = pictures.draw(inputs)
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        write_picture(picture, out / name)
    trace = {"checkpoint": inputs.spliced.identity(), **cite.as_json()}
    write_json(trace, out / TRACE_NAME)
    write_text(page, out / CARD_NAME)
    for pattern in _CHARTS:
        for path in out.glob(pattern):
            if path.name not in drawn:
                path.unlink()
    return {
        "card": str(out / CARD_NAME),
        "trace": str(out / TRACE_NAME),
        "charts": sorted(drawn),
        "numbers": len(trace["numbers"]),
        "not_measured": list(quality.missing(inputs)),
        "left_out": list(inputs.left_out),
    }


def _page(inputs: CardInputs, cite: Citations) -> str:
    """Return README.md; every section is asked for once, in the page's order."""
    environment = Environment(
        loader=PackageLoader("mtp_graft.bench.card", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is Markdown
    )
    template = environment.get_template("card.md.jinja")
    return re.sub(r"\n{3,}", "\n\n", template.render(_context(inputs, cite)))


def _context(inputs: CardInputs, cite: Citations) -> Mapping[str, Any]:
    licence = metadata.find_license(inputs.spliced.folder)
    return {
        "header": metadata.header(inputs, licence, cite),
        "name": inputs.name,
        "variant": inputs.spliced.variant,
        "base": made.hub_id(inputs.stages.get("fetch"), "base"),
        "upstream": made.hub_id(inputs.stages.get("fetch"), "upstream"),
        "verdicts": [
            said
            for measurement in inputs.of("decode", "pipeline")
            if (said := speed.verdict(measurement, cite))
        ],
        "headline": _with_charts(speed.headline(inputs, cite), "decode", "Decode speed"),
        "profiles": speed.profiles(inputs, cite),
        "scaling": _with_sweeps(inputs, speed.scaling(inputs, cite)),
        "workload": _with_charts(speed.workload(inputs, cite), "workload", "Everyday requests"),
        "acceptance": _with_charts(quality.acceptance(inputs, cite), "acceptance", "Acceptance"),
        "scores": _with_charts(quality.scores(inputs, cite), "scores", "Scores"),
        "not_measured": list(quality.missing(inputs)),
        "left_out": inputs.left_out,
        "serve_commands": commands.serve_commands(inputs, cite),
        "supported_vllm": mtp_graft.SUPPORTED_VLLM,
        "architecture": made.architecture(inputs, cite),
        "formats": made.formats(inputs, cite),
        "method": made.method(inputs, cite),
        "errors": made.errors(inputs, cite),
        "verification": made.verification(inputs, cite),
        "provenance": made.provenance(inputs, cite),
        "files": made.files(inputs, cite),
        "licence": licence,
        "is_int4": inputs.spliced.variant in ("rtn", "gptq"),
        "is_preserving": inputs.quantization["is_final_quality_preserving"].value,
        "has_own_attention": _has_own_attention(inputs),
        "on_cpu": any(env.is_cpu for env, _ in by_environment(inputs.measurements)),
        "num_environments": len(by_environment(inputs.measurements)),
    }


def _has_own_attention(inputs: CardInputs) -> bool:
    """Return whether the calibration's inputs went through the head's attention."""
    calibration = inputs.quantization.get("calibration")
    return calibration is None or str(calibration["replay"].value).startswith("true")


def _with_charts(blocks: Sequence[Block], chart: str, what: str) -> list[Block]:
    alt = f"{what}; the numbers are in the table below"
    return [
        replace(block, pictures=[image(pictures.chart_name(chart, number), alt)])
        for number, block in enumerate(blocks)
    ]


def _with_sweeps(inputs: CardInputs, blocks: Sequence[Block]) -> list[Block]:
    groups = by_environment(inputs.of("sweep"))
    return [
        replace(
            block,
            pictures=[
                image(
                    pictures.sweep_name(m),
                    f"Tokens a second by streams, {speed.label(m)}; numbers below",
                )
                for m in group
            ],
        )
        for block, (_, group) in zip(blocks, groups, strict=True)
    ]
