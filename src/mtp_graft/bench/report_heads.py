"""The report's sections about the heads: acceptance, size and error, calibration."""

from collections.abc import Iterator, Mapping
from typing import Any

from mtp_graft.bench.charts import Rate, in_order
from mtp_graft.bench.markdown import (
    NOT_MEASURED,
    NOTHING,
    bullets,
    count,
    drafts,
    image,
    interval,
    not_measured,
    number,
    percent,
    percents,
    points,
    table,
)
from mtp_graft.bench.results import RunResults, expert_errors, offline_rates, served_rates


def acceptance_section(results: RunResults) -> Iterator[str]:
    """Return how often each head's drafts were accepted, and which heads differ.

    Heads are compared by the first draft of a step, which is the same quantity for every k, and
    offline.
    """
    served, offline = served_rates(results), offline_rates(results)
    if not served:
        yield not_measured("Served acceptance")
    if not offline:
        yield not_measured("Offline acceptance")
    if not (served or offline):
        return
    said = [
        f"{variant} {_join_rates(served.get(variant), offline.get(variant))}"
        for variant in in_order({**served, **offline})
    ]
    yield image("acceptance.png", f"Acceptance with 95 % intervals: {'; '.join(said)}")
    rows = [
        [variant, name, percent(found[variant].rate), interval(found[variant]) or NOT_MEASURED,
         drafts(found[variant])]
        for variant in in_order({**served, **offline})
        for name, found in (("served", served), ("offline", offline))
        if variant in found
    ]  # fmt: skip
    heading = ["variant", "measured", "first draft accepted", "95 % interval", "drafts"]
    yield table(heading, rows, "llrrr")
    if results.served:
        rows = [
            [variant, f"{found['k']}", percents(found["acceptance_by_position"]),
             f"{found['acceptance_length']:.2f}"]
            for variant in in_order(results.served)
            for found in [results.served[variant]]
        ]  # fmt: skip
        yield table(["served", "k", "accepted by position", "tokens a step"], rows, "lrrr")
        yield (
            "k is the number of drafts a step. Each position's acceptance is given that all before "
            "it were accepted; tokens a step count the step's own."
        )
    paired = {name: results.result.get(key) or {} for name, key in _DIFFERENCES.items()}
    findings = [
        *(_compare_pairs("served", paired["served"]) or _compare_with_rtn("served", served)),
        *(_compare_pairs("offline", paired["offline"]) or _compare_with_rtn("offline", offline)),
        *_compare_with_bf16(served),
    ]
    if findings:
        yield bullets(findings)
    if any(rate.interval for rate in (*served.values(), *offline.values())):
        yield "Intervals of rates are Wilson's and take drafts as independent of each other."
    if any(paired.values()):
        yield "Intervals of differences come from resampling texts, the same for both heads."


_DIFFERENCES = {
    "served": "acceptance_difference",
    "offline": "acceptance_difference_offline",
}


def _join_rates(served: Rate | None, offline: Rate | None) -> str:
    named = (("served", served), ("offline", offline))
    return ", ".join(f"{percent(rate.rate)} {name}" for name, rate in named if rate)


def _compare_pairs(name: str, found: Mapping[str, tuple[float, float]]) -> list[str]:
    """Say which heads differ on the same texts, and by how much."""
    said = []
    for pair, (low, high) in found.items():
        ours, _, theirs = pair.partition("-")
        within = f"the difference is {points(0.0, low)} to {points(0.0, high)} (95 %)"
        if low > 0:
            verdict = f"{ours} is accepted more often than {theirs}"
        elif high < 0:
            verdict = f"{ours} is accepted less often than {theirs}"
        else:
            verdict = f"no difference between {ours} and {theirs} is shown"
        said.append(f"On the same texts, {name}: {verdict}; {within}.")
    return said


def _compare_with_rtn(name: str, found: Mapping[str, Rate]) -> Iterator[str]:
    """Say whether the intervals of gptq and rtn overlap, where the texts' counts are not known."""
    if "gptq" not in found or "rtn" not in found:
        return
    gptq, rtn = found["gptq"], found["rtn"]
    if gptq.interval is None or rtn.interval is None:
        yield f"The {name} rates of gptq and rtn have no intervals to compare."
        return
    both = f"the {name} intervals of gptq ({interval(gptq)}) and rtn ({interval(rtn)})"
    if gptq.interval[0] > rtn.interval[1]:
        yield f"gptq is accepted more often than rtn: {both} do not overlap."
    elif gptq.interval[1] < rtn.interval[0]:
        yield f"gptq is accepted less often than rtn: {both} do not overlap."
    else:
        yield f"No difference between gptq and rtn is shown: {both} overlap."


def _compare_with_bf16(served: Mapping[str, Rate]) -> Iterator[str]:
    if "gptq" in served and "bf16" in served and served["bf16"].rate:
        gptq, bf16 = served["gptq"].rate, served["bf16"].rate
        yield f"Served, gptq has {percent(gptq / bf16)} of the acceptance of bf16."


def variants_section(results: RunResults) -> Iterator[str]:
    """Return what each variant weighs, errs and is accepted."""
    served, offline = served_rates(results), offline_rates(results)
    stored = results.quantize["variants"] if results.quantize else {}
    if not results.quantize:
        yield not_measured("Size and error of the variants")
    names = in_order({**served, **offline, **stored})
    rows = []
    for name in names:
        rates = [found[name].rate if name in found else None for found in (offline, served)]
        rows.append([name, *_stored(stored.get(name)), *map(percent, rates), points(*rates)])
    if rows:
        heading = ["variant", "bits per weight", "bytes", "relative error", "offline", "served",
                   "served − offline"]  # fmt: skip
        yield table(heading, rows, "lrrrrrr")
    if not results.quantize:
        return
    yield (
        "Bits per weight are the routed experts', scales included; bytes are the whole head's. "
        "The relative error is Hessian-weighted, ‖(W − Q) H^½‖ / ‖W H^½‖, the mean over experts "
        "and matrices."
    )
    yield image("errors.png", f"Error of each expert: {_describe_errors(results.quantize)}")


def _stored(variant: Mapping[str, float] | None) -> list[str]:
    if variant is None:
        return [NOTHING] * 3
    error = f"{100 * variant['rel_error']:.2f} %"
    return [f"{variant['bits_per_weight']:.3f}", f"{variant['bytes']:,}", error]


def _describe_errors(quantize: Mapping[str, Any]) -> str:
    means = [
        f"{variant} {matrix} {100 * sum(values) / len(values):.2f} %"
        for variant, by_matrix in expert_errors(quantize).items()
        for matrix, values in by_matrix.items()
    ]
    return f"means {', '.join(means)}"


def calibration_section(results: RunResults) -> Iterator[str]:
    """Return what the head was calibrated on."""
    if results.capture is None:
        yield not_measured("The capture")
    else:
        yield from _capture(results.capture)
    if results.quantize is None:
        yield not_measured("The calibration")
        return
    quantize, tokens = results.quantize, results.quantize["tokens_per_expert"]
    yield (
        f"GPTQ with damp {quantize['damp']} and groups of {quantize['group_size']}, calibrated on "
        f"{quantize['calibration_tokens']:,} tokens (replay: {quantize['replay']}). Time: "
        f"{', '.join(f'{part} {s:,.1f} s' for part, s in quantize['seconds'].items())}. Peak "
        f"memory: {quantize['peak_host_bytes']:,} bytes on the host, "
        f"{quantize['peak_gpu_bytes']:,} on the GPU."
    )
    caption = (
        f"Tokens per expert: {tokens['min']:,} at the least, {tokens['mean']:,.1f} in the mean, "
        f"{tokens['max']:,} at the most; {count(tokens['zero'], 'expert')} without tokens"
    )
    yield image("tokens.png", caption)
    if tokens["zero"]:
        experts = ", ".join(map(str, quantize["experts_without_tokens"]))
        caption += f" ({experts}), treated by the policy `{quantize['zero_token_policy']}`"
    yield f"{caption}."


def _capture(capture: Mapping[str, Any]) -> Iterator[str]:
    speeds = capture["tok_s"]
    rows = [
        ["sequences", f"{capture['sequences']:,}"],
        ["tokens", f"{capture['tokens']:,}"],
        *([f"{what}, tok/s", number(speeds[key])] for key, what in _CAPTURE_SPEEDS.items()),
        ["seconds", number(capture["seconds"])],
    ]
    yield table(["capture", "result"], rows, "lr")
    if dropped := capture.get("dropped"):
        names = ", ".join(f"{prompt['id']} ({prompt['tokens']:,} tokens)" for prompt in dropped)
        yield f"Left out as too long, and replaced: {names}."
    plain, recording = speeds["prefill"], speeds["prefill_recording"]
    if plain and recording:
        yield f"With recording, prefill runs at {recording / plain:.2f}× its speed without."


_CAPTURE_SPEEDS = {
    "generate": "generating",
    "prefill": "prefill",
    "prefill_recording": "prefill, recording",
}
