"""The report of a run: one HTML file, made of the stages' JSON, that needs no other file.

Every number is one that a stage measured, or a ratio or sum of such numbers; what was not measured
is named as such. No dates: the same results give the same bytes.
"""

from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_graft.bench import charts
from mtp_graft.bench.decode import Turn, first_difference, median_round
from mtp_graft.bench.page import as_html, number, render
from mtp_graft.checkpoint.files import write_text

PAGE_NAME = "report.html"
Json = Mapping[str, Any]


def write_report(folder: Path, found: Json) -> Path:
    """Write `report.html` to `folder` and return its path; GraftError if the disk is full.

    `found` has `result` (of `run` and `demo`); `capture`, `quantize`, `heal`, `score` and `verify`,
    the stages' JSON; `served`, by head as `bench.decode.measure_acceptance`; `decode`, as
    `bench.decode.compare`; and `recorded`, as `recorded_answers`: all of these None where there is
    nothing (`served`: empty). It has `model`, `device`, `versions` by package, `on_cpu` and the
    capture's `concurrency`, too.
    """
    served, decode = found["served"], found["decode"]
    heads = head_acceptance(served, (found["score"] or {}).get("acceptance", {}))
    drawn = {"acceptance": charts.acceptance_chart(heads)} if heads else {}
    if decode:
        rows = decode_rows({"base": decode["against"], "with MTP": decode})
        title = "Decode speed, tokens a second: median, slowest and fastest round"
        drawn["decode"] = charts.row_chart(title, rows)
    data = {
        **found,
        "heads": heads,
        # The head that the summary is about.
        "main": "gptq" if "gptq" in served else (found["verify"] or {}).get("variant", "served"),
        "colours": {"own": charts.BASE_COLOUR, "draft": charts.MTP_COLOUR},
        "charts": {name: b64encode(png).decode() for name, png in drawn.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PAGE_NAME
    write_text(render("report.html", as_html, data), path)
    return path


def head_acceptance(served: Json, offline: Json) -> list[dict[str, Any]]:
    """Return `name`, `served` and `offline` of every head that was measured, None where it wasn't.

    They are as `bench.decode.measure_acceptance` and the score stage give them.
    """
    names = dict.fromkeys([*charts.HEAD_COLOURS, *served, *offline])
    found = [{"name": n, "served": served.get(n), "offline": offline.get(n)} for n in names]
    return [head for head in found if head["served"] or head["offline"]]


def decode_rows(decoded: Mapping[str, Json]) -> list[charts.Row]:
    """Return a bar for each result of `bench decode`, the base's (without acceptance) in grey."""
    rows = []
    for name, result in decoded.items():
        middle, *ends = (result["decode_tok_s"][key] for key in ("median", "min", "max"))
        colour = charts.MTP_COLOUR if result["acceptance"] else charts.BASE_COLOUR
        rows.append(charts.Row(name, middle, number(middle), colour, ends))
    return rows


def recorded_answers(base: Turn | None, mtp: Turn | None) -> dict[str, Any] | None:
    """Return the answers of the rounds with the median speed; None if there are none.

    Keys: `base` and `mtp`, each with `round` (from 1) and `rounds`; and `answers`, for each prompt
    `id`, `divergence` (the first token that differs, None if none does), `base` and `mtp`: `k` (0:
    nothing was drafted), `counters` (the server's), `seconds`, `tokens` and `steps` [{`at` (seconds
    from the request), `start` (its first token), `tokens`, `text`, `apart` (whether the other
    answer differs by then), `accepted` (drafts), `acceptance` (so far, None where unknown)}].
    """
    if base is None or mtp is None:
        return None
    turns, answers = {"base": base, "mtp": mtp}, []
    chosen = {side: median_round(turn) for side, turn in turns.items()}
    rounds = (turn["rounds"][chosen[side]] for side, turn in turns.items())
    for prompt, ours, theirs in zip(base["prompts"], *rounds, strict=True):
        divergence = first_difference(ours["token_ids"], theirs["token_ids"])
        sides = {"base": _steps(ours, divergence), "mtp": _steps(theirs, divergence)}
        answers.append({"id": prompt, "divergence": divergence, **sides})
    told = {s: {"round": chosen[s] + 1, "rounds": len(turn["rounds"])} for s, turn in turns.items()}
    return told | {"answers": answers}


def _steps(answer: Json, divergence: int | None) -> dict[str, Any]:
    """Return an answer's steps, a chunk each.

    A chunk has the accepted drafts, then one token of the step's own; the first is prefill's.
    """
    counters = answer["counters"]
    k = counters["num_draft_tokens"] // max(1, counters["num_drafts"]) if counters else 0
    steps: list[dict[str, Any]] = []
    start = accepted = 0
    for n, ((at, size), text) in enumerate(zip(answer["chunks"], answer["texts"], strict=True)):
        new = min(size - 1, k) if n else 0  # a slow client gets several steps in one chunk
        accepted += new
        step = {"at": round(at, 6), "start": start, "tokens": size, "text": text, "accepted": new}
        start += size
        step["apart"] = divergence is not None and start > divergence
        step["acceptance"] = accepted / (n * k) if n and k else None
        steps.append(step)
    seconds = answer["chunks"][-1][0]
    return {"k": k, "counters": counters, "seconds": seconds, "tokens": start, "steps": steps}
