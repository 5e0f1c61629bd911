"""The report of a run: a Markdown page with charts, and the same as one HTML file.

It is made of the stages' JSON and nothing else.

Every number is one that a stage measured, or a ratio, difference or mean of such numbers. What was
not measured is named as such. No dates and no paths of this machine but those in the results: the
same results give the same bytes.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtp_graft.bench import charts
from mtp_graft.bench.markdown import (
    NOT_MEASURED,
    NOTHING,
    bullets,
    count,
    image,
    interval,
    not_measured,
    percent,
    percents,
    rate_spread,
    spread,
    table,
    visible,
    yes_no,
)
from mtp_graft.bench.recorded import read_recordings
from mtp_graft.bench.report_heads import (
    acceptance_section,
    calibration_section,
    variants_section,
)
from mtp_graft.bench.report_page import render_page
from mtp_graft.bench.report_tokens import tokens_section
from mtp_graft.bench.results import (
    RunResults,
    expert_errors,
    main_variant,
    offline_rates,
    served_rates,
    speedup,
    stage_seconds,
)
from mtp_graft.checkpoint.shards import is_full_disk, write_text
from mtp_graft.errors import GraftError

PAGE_NAME, HTML_NAME = "report.md", "report.html"
_TOKENS = "Token by token"
CHARTS = ("acceptance.png", "errors.png", "tokens.png", "decode.png", "stages.png")
_REPRODUCE = """\
```sh
mtp-graft run RECIPE --run DIR    # the recipe and the run folder of this run; goes on if cut off
```

Each stage's folder in the run folder has a `manifest.json` with the configuration, the inputs'
hashes, the commit and the versions it ran with, and the JSON that this page is made of."""


def write_report(folder: Path, results: RunResults) -> Path:
    """Write `report.md`, its charts and `report.html` to `folder`; return the first's path.

    Charts go first and `report.md` last, each under a temporary name. Charts of an earlier report
    that this one does not have are removed. Raises GraftError if the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _draw(results)
    for name, picture in drawn.items():
        write_picture(picture, folder / name)
    title, sections = f"MTP head for {visible(results.model)}", _sections(results)
    recordings = read_recordings(results.recorded)
    page = render_page(title, sections, drawn, recordings, figures_in=_TOKENS)
    write_text(page, folder / HTML_NAME)
    path = folder / PAGE_NAME
    parts = [f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items()]
    write_text("\n\n".join([f"# {title}", *parts]) + "\n", path)
    for name in CHARTS:
        if name not in drawn:
            (folder / name).unlink(missing_ok=True)
    return path


def write_picture(picture: bytes, path: Path) -> None:
    """Write a chart under a temporary name, then rename it; GraftError for a full disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(picture)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if not is_full_disk(error):
            raise
        raise GraftError(
            f"{path}: the disk is full; {len(picture):,} bytes are to be written there: "
            "make room and run again"
        ) from error


def _draw(results: RunResults) -> dict[str, bytes]:
    """Return the charts that there are numbers for, by file name."""
    drawn: dict[str, bytes] = {}
    served, offline = served_rates(results), offline_rates(results)
    if served or offline:
        drawn["acceptance.png"] = charts.acceptance_chart(served, offline)
    if results.quantize:
        counts = results.quantize["tokens_per_expert"]["counts"]
        drawn["errors.png"] = charts.error_chart(expert_errors(results.quantize), counts)
        drawn["tokens.png"] = charts.token_chart(counts)
    if results.decode:
        base, mtp = (results.decode[name]["decode_tok_s"] for name in ("base", "mtp"))
        drawn["decode.png"] = charts.decode_chart(base, mtp)
    if results.result["seconds"]:
        drawn["stages.png"] = charts.stage_chart(stage_seconds(results))
    return drawn


def _sections(results: RunResults) -> dict[str, str]:
    """Return the Markdown under each heading; under the empty one, the summary."""
    sections = {
        "": (_verdict(results), *_headline(results)),
        "Acceptance": acceptance_section(results),
        "Variants": variants_section(results),
        "Calibration": calibration_section(results),
        "Decode speed": _decode(results),
        _TOKENS: tokens_section(results),
        "Verification": _verification(results),
        "Time": _time(results),
        "How to reproduce": (_REPRODUCE,),
        "Device and versions": _device(results),
        "Notes": (bullets(results.notes or ["None."]),),
    }
    return {heading: visible("\n\n".join(parts)) for heading, parts in sections.items()}


# The page, section by section


def _verdict(results: RunResults) -> str:
    """Return the summary: one sentence, of what was measured."""
    findings = []
    if (acceptance := results.result["acceptance"]) is not None:
        head = main_variant(results)
        length = f"{results.result['acceptance_length']:.2f} tokens a step"
        found = f"the server accepts {percent(acceptance)} of the {head} head's drafts, {length}"
        findings.append(found)
    if (ratio := speedup(results)) is not None:
        findings.append(f"decoding with MTP is {_describe_speedup(ratio)}")
    if results.result["greedy_identical"] is not None:
        findings.append(f"the greedy text is {_describe_texts(results)}")
    if results.verify:
        findings.append(f"the checkpoint {_describe_check(results.verify)}")
    sentence = "; ".join(findings) or "nothing of the finished checkpoint was measured"
    return f"**{sentence[0].upper()}{sentence[1:]}.**"


def _describe_speedup(ratio: float) -> str:
    shown = f"{ratio:.2f}×"
    if shown == "1.00×":
        return f"as fast as without ({shown} the base's speed)"
    word = "faster" if ratio > 1 else "slower"
    return f"{word} than without ({shown} the base's speed)"


def _describe_texts(results: RunResults) -> str:
    if results.result["greedy_identical"]:
        prompts = f"all {results.decode['mtp']['num_prompts']}" if results.decode else "all"
        return f"the same with and without MTP on {prompts} prompts"
    if not results.result["divergences"]:
        return "not the same in every round of one server"
    return f"not the same on {count(len(results.result['divergences']), 'prompt')}"


def _describe_check(verify: Mapping[str, Any]) -> str:
    return "passes verification" if verify["ok"] else "fails verification"


def _headline(results: RunResults) -> Iterator[str]:
    speeds, ratio = results.result["decode_tok_s"], speedup(results)
    rows = [["decode speed, base", f"{speeds['base']:,.1f} tok/s" if speeds else NOT_MEASURED]]
    with_mtp = f"{speeds['mtp']:,.1f} tok/s, {ratio:.2f}× the base's" if speeds else NOT_MEASURED
    rows.append(["decode speed, with MTP", with_mtp])
    head = main_variant(results)
    first = served_rates(results).get(head)
    shown = f"{percent(first.rate)} (95 %: {interval(first)})" if first else NOT_MEASURED
    rows.append([f"first draft accepted, {head}", shown])
    length = results.result["acceptance_length"]
    shown = NOT_MEASURED if length is None else f"{length:.2f} (k = {results.result['k']})"
    rows.append([f"tokens a step, {head}", shown])
    identical = {True: "yes", False: "no", None: NOT_MEASURED}[results.result["greedy_identical"]]
    rows.append(["greedy text identical", identical])
    verified = "ok" if results.verify and results.verify["ok"] else "failed"
    rows.append(["verification", NOT_MEASURED if results.verify is None else verified])
    yield table(["headline", "result"], rows, "lr")


def _decode(results: RunResults) -> Iterator[str]:
    if results.decode is None:
        yield not_measured("Decode speed, as a spread over rounds,")
    else:
        yield from _speeds(results.decode)
    if results.result["greedy_identical"] is None:
        yield not_measured("Whether MTP changes the greedy text")
    elif results.result["greedy_identical"]:
        yield "The greedy text is the same with and without MTP on every prompt."
    elif not results.result["divergences"]:
        yield "A server's greedy text is not the same in every round, so there is none to compare."
    else:
        yield "The greedy text differs; the margin is the base's, between its two best tokens:"
        rows = [
            [d["prompt"], f"{d['position']:,}", NOTHING if d["margin"] is None
             else f"{d['margin']:.4f}"]
            for d in results.result["divergences"]
        ]  # fmt: skip
        yield table(["prompt", "position", "margin"], rows, "lrr")


def _speeds(decode: Mapping[str, Any]) -> Iterator[str]:
    base, mtp = decode["base"], decode["mtp"]
    speeds = base["decode_tok_s"], mtp["decode_tok_s"]
    said = [f"{n} {s['median']:,.1f}" for n, s in zip(("base", "with MTP"), speeds, strict=True)]
    yield image("decode.png", f"Decode speed in tokens a second: {', '.join(said)}")
    measured = {
        "decode, tok/s": "decode_tok_s",
        "time to first token, ms": "ttft_ms",
        "time per token after it, ms": "tpot_ms",
    }
    rows = [[what, spread(base[key]), spread(mtp[key])] for what, key in measured.items()]
    rates = [rate_spread(result["acceptance"]) for result in (base, mtp)]
    rows.append(["drafts accepted", *rates])
    positions = [percents(result["acceptance_by_position"]) for result in (base, mtp)]
    rows.append(["accepted by position", *positions])
    lengths = [result["acceptance_length"] for result in (base, mtp)]
    rows.append(["tokens a step", *(NOTHING if n is None else f"{n:.2f}" for n in lengths)])
    rows.append(["rounds", *(f"{speed['runs']}" for speed in speeds)])
    yield table(["median (min to max)", "base", "with MTP"], rows, "lrr")
    overlap = speeds[0]["min"] <= speeds[1]["max"] and speeds[1]["min"] <= speeds[0]["max"]
    yield (
        f"Each round continues {count(mtp['num_prompts'], 'prompt')}, one at a time, by "
        f"{mtp['tokens_per_round']:,} tokens in all. The rounds' speeds with and without MTP "
        f"{'overlap' if overlap else 'do not overlap'}."
    )


def _verification(results: RunResults) -> Iterator[str]:
    verify = results.verify
    if verify is None:
        yield not_measured("The checkpoint's integrity")
        return
    flags = {
        "result": "ok" if verify["ok"] else "failed",
        "loaded in vLLM": yes_no(verify["loaded_in_vllm"]),
        "base's files linked": yes_no(verify.get("base_files_linked")),
        "base unchanged": yes_no(verify.get("base_unchanged")),
    }
    rows = [
        *([what, shown] for what, shown in flags.items()),
        ["tensors compared", f"{verify['tensors']:,}"],
        *([f"{what} tensors", f"{len(verify[what]):,}"] for what in _FAULTS),
        ["largest relative error (Frobenius)", f"{verify['rel_error_max']:.4f}"],
    ]
    variant = verify.get("variant")
    yield table([f"verification{f' of {variant}' if variant else ''}", "result"], rows, "lr")
    faults = [f"{what}: {_describe_fault(each)}" for what in _FAULTS for each in verify[what]]
    if faults:
        yield bullets(faults)


_FAULTS = ("missing", "unexpected", "mismatched")


def _describe_fault(fault: str | Mapping[str, str]) -> str:
    return f"`{fault}`" if isinstance(fault, str) else f"`{fault['tensor']}` {fault['why']}"


def _time(results: RunResults) -> Iterator[str]:
    seconds = stage_seconds(results)
    if not seconds:
        yield not_measured("The stages' time")
        return
    said = ", ".join(f"{stage} {value:,.1f} s" for stage, value in seconds.items())
    yield image("stages.png", f"Time of each stage: {said}")
    yield f"{sum(seconds.values()):,.1f} s in all."


def _device(results: RunResults) -> Iterator[str]:
    rows = [["device", results.device], *([k, v] for k, v in results.versions.items())]
    yield table(["what", "which"], rows, "ll")
