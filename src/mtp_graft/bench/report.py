"""The report of a run: what was measured, in Markdown with charts beside it.

Every number is taken or computed from the stages' results; what was not measured is said to be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_graft.bench import charts
from mtp_graft.checkpoint.shards import write_text

Json = Mapping[str, Any]


@dataclass(frozen=True)
class RunResults:
    """The stages' JSON results; None for what has not been run."""

    model: str
    device: str
    versions: Mapping[str, str]
    result: Json  # of `run`
    capture: Json | None = None
    quantize: Json | None = None
    score: Json | None = None
    served: Mapping[str, Json] | None = None  # variant -> counts
    decode: Json | None = None
    verify: Json | None = None
    notes: Sequence[str] = ()


def write_report(folder: Path, results: RunResults) -> Path:
    """Write `folder/report.md` and its charts; return the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        _head(results),
        _acceptance(folder, results),
        _decode(folder, results),
        _variants(results),
        _calibration(folder, results),
        _verification(results),
        _seconds(folder, results),
        _environment(results),
    ]
    path = folder / "report.md"
    write_text("\n\n".join(section for section in sections if section) + "\n", path)
    return path


def _head(results: RunResults) -> str:
    result = results.result
    lines = [f"# {results.model}", ""]
    acceptance, speeds = result.get("acceptance"), result.get("decode_tok_s")
    facts = []
    if acceptance is not None:
        facts.append(f"the served head has **{_percent(acceptance)}** of its drafts accepted")
    if speeds is not None:
        ratio = speeds["mtp"] / speeds["base"]
        facts.append(f"decoding runs at **{ratio:.2f} times** the base's speed")
    if result.get("greedy_identical") is not None:
        same = "the same as" if result["greedy_identical"] else "**not** the same as"
        facts.append(f"greedy text is {same} the base's")
    summary = "; ".join(facts) if facts else "nothing has been served yet"
    lines.append(summary[0].upper() + summary[1:] + ".")
    lines += [f"\n> {note}" for note in results.notes]
    return "\n".join(lines)


def _acceptance(folder: Path, results: RunResults) -> str:
    offline = {
        name: (a["top1"], *a["interval"])
        for name, a in (results.score or {"acceptance": {}})["acceptance"].items()
    }
    served = {name: (s["acceptance"], *s["interval"]) for name, s in (results.served or {}).items()}
    lines = ["## Acceptance", ""]
    if not offline and not served:
        return "\n".join([*lines, "Not measured."])
    charts.draw_acceptance(folder / "acceptance.png", offline, served)
    lines += ["![Acceptance of every head, offline and served](acceptance.png)", ""]
    if offline:
        drafts = max(a["tokens"] for a in results.score["acceptance"].values())  # type: ignore[index]
        lines.append(
            f"Offline: the server's walk over the captured texts, up to {drafts:,} drafts."
        )
    if served:
        drafts = max(s["drafted"] for s in results.served.values())  # type: ignore[union-attr]
        texts = max(s["texts"] for s in results.served.values())  # type: ignore[union-attr]
        lines.append(
            f"Served: vLLM's own counters on {texts} of the texts, up to {drafts:,} drafts."
        )
        lines.append(_overlap(served))
    else:
        lines.append("Served acceptance was not measured.")
    return "\n".join(lines)


def _overlap(served: Mapping[str, tuple[float, float, float]]) -> str:
    """Say in words whether GPTQ can be told from rounding to nearest."""
    if "gptq" not in served or "rtn" not in served:
        return ""
    (gptq, gptq_low, gptq_high), (rtn, rtn_low, rtn_high) = served["gptq"], served["rtn"]
    if gptq_low > rtn_high:
        return "GPTQ's head is accepted more often than the one rounded to nearest."
    if rtn_low > gptq_high:
        return "GPTQ's head is accepted **less** often than the one rounded to nearest."
    points = 100 * (gptq - rtn)
    return (
        f"GPTQ and rounding to nearest are {points:+.1f} points apart and their intervals overlap: "
        "on these texts the served acceptance does not tell them apart."
    )


def _decode(folder: Path, results: RunResults) -> str:
    if results.decode is None:
        return "## Decode speed\n\nNot measured."
    base, mtp = results.decode["base"], results.decode["mtp"]
    speeds = {"base": base["decode_tok_s"], "with MTP": mtp["decode_tok_s"]}
    charts.draw_decode_speed(folder / "decode.png", speeds)
    rows = [
        [
            name,
            *(_spread(side[key]) for key in ("decode_tok_s", "ttft_ms", "tpot_ms")),
            _spread(side["acceptance"], 100, " %"),
        ]
        for name, side in (("base", base), ("with MTP", mtp))
    ]
    divergences = results.result.get("divergences") or []
    lines = [
        "## Decode speed",
        "",
        "![Decode speed of the base and with MTP](decode.png)",
        "",
        _table(["", "decode tok/s", "TTFT ms", "ms a token", "acceptance"], rows),
        "",
        f"Greedy, one stream, {base['num_prompts']} prompts, {base['tokens_per_round']:,} tokens a "
        f"round; median (least to most) of {base['decode_tok_s']['runs']} rounds.",
    ]
    if divergences:
        lines += ["", "Texts that left the base's:", ""]
        rows = [[d["prompt"], str(d["position"]), f"{d['margin']}"] for d in divergences]
        lines.append(_table(["prompt", "position", "the base's margin there"], rows))
    return "\n".join(lines)


def _variants(results: RunResults) -> str:
    if results.quantize is None:
        return "## Heads\n\nNot quantized."
    offline, served = results.result["acceptance_offline"], results.result["acceptance_served"]
    rows = [
        [
            name,
            f"{v['bits_per_weight']:.2f}",
            f"{v['bytes'] / 2**20:,.1f}",
            _percent(v["rel_error"]),
            _percent(offline.get(name)),
            _percent(served.get(name)),
        ]
        for name, v in results.quantize["variants"].items()
    ]
    header = ["head", "bits a weight", "MiB", "error", "offline", "served"]
    return "\n".join(
        [
            "## Heads",
            "",
            _table(header, rows),
            "",
            "Bits a weight are the routed experts', scales included. The error is weighted with "
            "the Hessian of the calibration tokens themselves, which flatters GPTQ, and averaged "
            "over experts.",
        ]
    )


def _calibration(folder: Path, results: RunResults) -> str:
    if results.quantize is None:
        return ""
    quantized = results.quantize
    tokens = quantized["tokens_per_expert"]
    errors = {
        v: quantized["rel_errors"][v] for v in ("rtn", "gptq") if v in quantized["rel_errors"]
    }
    charts.draw_expert_errors(folder / "errors.png", errors)
    charts.draw_tokens_per_expert(folder / "tokens.png", tokens["counts"])
    lines = [
        "## Calibration",
        "",
        "![Relative error of every expert, by matrix](errors.png)",
        "",
        "![Calibration tokens that reached each expert](tokens.png)",
        "",
        f"Tokens an expert: {tokens['min']:,} at least, {tokens['mean']:,.0f} on average, "
        f"{tokens['max']:,} at most; {tokens['zero']} experts without any.",
    ]
    if results.capture is not None:
        captured, rates = results.capture, results.capture["tok_s"]
        lines.append(
            f"Captured {captured['sequences']:,} sequences, {captured['tokens']:,} tokens, in "
            f"{captured['seconds']:.0f} s."
        )
        if rates["prefill"] and rates["prefill_recording"]:
            ratio = rates["prefill_recording"] / rates["prefill"]
            lines.append(
                f"Recording ran at {ratio:.2f} times the speed of the same prefills without."
            )
    return "\n".join(lines)


def _verification(results: RunResults) -> str:
    found = results.verify
    if found is None:
        return "## Verification\n\nNot run."
    loaded = "not tried" if found["loaded_in_vllm"] is None else _word(found["loaded_in_vllm"])
    rows = [
        ["tensors compared", f"{found['tensors']:,}"],
        ["missing, unexpected, different", _counts(found)],
        ["largest relative error of an expert matrix", _percent(found["rel_error_max"])],
        ["base files linked", _word(found["base_files_linked"])],
        ["base unchanged", _word(found["base_unchanged"])],
        ["loaded in vLLM", loaded],
    ]
    return "\n".join(["## Verification", "", _table(["what", "found"], rows)])


def _counts(found: Json) -> str:
    return ", ".join(str(len(found[key])) for key in ("missing", "unexpected", "mismatched"))


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _seconds(folder: Path, results: RunResults) -> str:
    seconds = {stage: s for stage, s in results.result["seconds"].items() if s >= 0.05}
    if not seconds:
        return ""
    charts.draw_stage_seconds(folder / "seconds.png", seconds)
    total = sum(seconds.values())
    return f"## Time\n\n![Seconds of each stage](seconds.png)\n\n{total:.0f} s in all."


def _environment(results: RunResults) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    lines = [
        "## Where",
        "",
        f"{results.device}; {versions}.",
        "",
        "The numbers are in this run's `capture/report.json`, `quantize/report.json`, "
        "`score/report.json`, `verify/` and `bench/`; `manifest.json` in each says what made them.",
    ]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(spread: Json | None, factor: float = 1.0, unit: str = "") -> str:
    if spread is None:
        return "-"
    median, least, most = (factor * spread[key] for key in ("median", "min", "max"))
    return f"{median:.1f}{unit} ({least:.1f} to {most:.1f})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
