"""Extrapolate step times to all 43 layers, and say what speed-up to expect at which acceptance.

    python benchmarks/step_time_table.py benchmarks/results/step_time_*_h100.json [--layers 43]

Of two numbers of layers the GPU's time for one layer more is known, b. If the GPU computes for most
of a step of the larger number, a step of all layers takes b for each layer more. If it mostly waits
for the engine's scheduling and launching, which overlap with it, a step takes what it took until
the GPU's time is longer. With the probability p that a draft is accepted, if all before it were, a
step brings 1 + p + ... + p^k tokens, so

    speed-up = (1 + p + ... + p^k) x base step time / MTP step time.

The Markdown keeps apart what was measured (few layers) and what is extrapolated. What it leaves
out: real routing is skewed where random weights' is even, a server's own time a step, and other
hardware. Two numbers of layers cannot show a departure from the line.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from step_time import summarize, tokens_per_step

RATES = (0.6, 0.7, 0.85, 0.95)
ACTI = (
    "The Acti card reports 1.62x (524k profile) and 2.10x (128k, single stream), with two RTX PRO "
    "6000 Max-Q, the base without MTP against k = 1; its acceptance and hardware are others."
)
NOISE = "**An MTP step that takes less than its base's cannot be: noise. Measure again.**"
#: Below this share of a step the GPU waits for the engine.
HOST_BOUND = 2 / 3
Key = tuple[str, int, int]  # variant, k, streams
Row = tuple[str, Key, float, float, str]  # layers, load, base and MTP step in ms, GPU's times


def extrapolate(results: list[dict[str, Any]], layers: int) -> dict[Key, tuple[float, float]]:
    """Return base and MTP step time in ms at `layers`, of what was timed at two or more.

    Of more than two numbers of layers the smallest and the largest are taken.
    """
    found: dict[Key, list[dict[str, Any]]] = {}
    for line in results:
        if line["gpu_ms_base"] and line["gpu_ms_mtp"]:
            found.setdefault((line["variant"], line["k"], line["streams"]), []).append(line)
    times: dict[Key, tuple[float, float]] = {}
    for key, lines in found.items():
        few, many = (choose(lines, key=lambda line: line["layers"]) for choose in (min, max))
        if few["layers"] < many["layers"]:
            base, mtp = (step_ms(few, many, kind, layers) for kind in ("base", "mtp"))
            times[key] = base, mtp
    return times


def step_ms(few: dict[str, Any], many: dict[str, Any], kind: str, layers: int) -> float:
    """Return the time of a step with `layers`, from two that were measured and timed."""
    step, busy = many[f"step_ms_{kind}"], many[f"gpu_ms_{kind}"]
    b = (busy - few[f"gpu_ms_{kind}"]) / (many["layers"] - few["layers"])
    added = b * (layers - many["layers"])
    return step + added if busy >= HOST_BOUND * step else max(step, busy + added)


def extrapolate_gpu(results: list[dict[str, Any]], layers: int) -> dict[Key, tuple[float, float]]:
    """Return the same of the GPU's time alone: the steps of a host that is never waited for."""
    alone = [
        r | {f"step_ms_{kind}": r[f"gpu_ms_{kind}"] for kind in ("base", "mtp")} for r in results
    ]
    return extrapolate(alone, layers)


def speed_ups(base_ms: float, mtp_ms: float, k: int) -> list[float]:
    return [tokens_per_step(k, rate) * base_ms / mtp_ms for rate in RATES]


def table(rows: list[Row]) -> list[str]:
    """Return a Markdown table of step times and what follows from them."""
    rates = "".join(f" {rate:.0%} |" for rate in RATES)
    lines = [f"| layers | head | k | streams | base ms | MTP ms | of these GPU | cost |{rates}"]
    lines.append("| ---: | --- " + "| ---: " * (6 + len(RATES)) + "|")
    for first, (variant, k, streams), base, mtp, busy in rows:
        cells = [first, variant, str(k), str(streams), f"{base:.2f}", f"{mtp:.2f}", busy]
        cells += [f"{mtp / base:.2f}x", *(f"{s:.2f}x" for s in speed_ups(base, mtp, k))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(report: dict[str, Any], layers: int) -> str:
    speeds = directly_measured(report["measurements"])
    lines = [*measured(report), "", *extrapolated(report, layers), "", *noise(report, layers)]
    return "\n".join([*lines, *speeds, ACTI])


def measured(report: dict[str, Any]) -> list[str]:
    """Return the table of measured step times, and what follows from them."""
    rows = [
        (
            str(r["layers"]),
            (r["variant"], r["k"], r["streams"]),
            r["step_ms_base"],
            r["step_ms_mtp"],
            busy_cell(r),
        )
        for r in report["results"]
    ]
    heading = f"**Measured** step times, {report['device']}; the speed-ups are computed of them:"
    return [heading, "", *table(rows)]


def extrapolated(report: dict[str, Any], layers: int) -> list[str]:
    """Return the tables of what to expect at `layers`, with the host as it was and without it."""
    heading = f"**Extrapolated** to {layers} layers, not measured:"
    whole = extrapolate(report["results"], layers)
    if not whole:
        return [heading, "", "(two numbers of layers, timed on a GPU, are needed)"]
    alone = extrapolate_gpu(report["results"], layers)
    return [
        heading,
        "",
        *table([(str(layers), key, *times, "") for key, times in whole.items()]),
        "",
        "**The GPU's time alone**, extrapolated: no host is waited for.",
        "",
        *table([(str(layers), key, *times, "all") for key, times in alone.items()]),
    ]


def noise(report: dict[str, Any], layers: int) -> list[str]:
    """Return a warning if a step is shorter with the head than without."""
    results = report["results"]
    pairs = [(r["step_ms_base"], r["step_ms_mtp"]) for r in results]
    pairs += extrapolate(results, layers).values()
    return [NOISE, ""] if any(mtp < base for base, mtp in pairs) else []


def busy_cell(line: dict[str, Any]) -> str:
    if line["gpu_ms_base"] is None or line["gpu_ms_mtp"] is None:
        return ""
    return f"{line['gpu_ms_base']:.2f}, {line['gpu_ms_mtp']:.2f}"


def directly_measured(entries: list[dict[str, Any]]) -> list[str]:
    """Return decode speeds at synthetic acceptance over the base's, as they were measured."""
    bases: dict[tuple[int, int, int], list[float]] = {}
    entries = [e for e in entries if not e["clock"]]
    for e in entries:
        if e["variant"] == "base":
            key = e["layers"], e["context"], e["streams"]
            bases.setdefault(key, []).append(e["aggregate_tok_s"])
    lines = []
    for e in sorted(entries, key=lambda e: (e["layers"], e["variant"], e["k"])):
        found = bases.get((e["layers"], e["context"], e["streams"]))
        if e["rate"] is None or found is None:
            continue
        base = median(found)
        ratio = e["aggregate_tok_s"] / base
        cells = (e["layers"], e["variant"], e["k"], e["streams"], e["context"], f"{e['rate']:.0%}")
        speeds = (f"{base:.1f}", f"{e['aggregate_tok_s']:.1f}", f"{ratio:.2f}x")
        lines.append(f"| {' | '.join(map(str, (*cells, *speeds)))} |")
    if not lines:
        return []
    head = "| layers | head | k | streams | context | acceptance | base tok/s | MTP tok/s | ratio |"
    ruler = "| ---: | --- |" + " ---: |" * 7
    return ["**Measured** decode speed at synthetic acceptance:", "", head, ruler, *lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="of one kind of GPU")
    parser.add_argument("--layers", type=int, default=43)
    options = parser.parse_args()
    print(markdown(together(options.results), options.layers))


def together(files: list[Path]) -> dict[str, Any]:
    """Return the measurements of all files as one report; a base is paired with every file's."""
    reports = [json.loads(file.read_text()) for file in files]
    devices = {report["device"] for report in reports}
    if len(devices) > 1:
        raise SystemExit(f"results of {', '.join(sorted(devices))}: give those of one kind")
    entries = [entry for report in reports for entry in report["measurements"]]
    return {"device": devices.pop(), "results": summarize(entries), "measurements": entries}


if __name__ == "__main__":
    main()
