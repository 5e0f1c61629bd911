"""The card's sections on speed: the headline, profiles, scaling with streams, the workload."""

from collections.abc import Iterator, Sequence

from mtp_graft.bench.card.cite import Citations, Cited, Name, Node
from mtp_graft.bench.card.collect import CardInputs, Environment, Measurement, by_environment
from mtp_graft.bench.card.tables import Block, Table
from mtp_graft.bench.markdown import NOT_MEASURED, NOTHING

PIPELINE_LABEL = "recipe's own"


def measured_on(environment: Environment, cite: Citations) -> str:
    """Return the line above a table: whose numbers these are."""
    device = cite.show("text", environment.device) if environment.device else "not recorded"
    if environment.vllm is None:
        return f"**Device: {device}.** vLLM's version was not recorded."
    name = environment.vllm.pointer.rpartition("/")[2]
    return f"**Device: {device}.** {name} {cite.show('text', environment.vllm)}."


def headline(inputs: CardInputs, cite: Citations) -> list[Block]:
    """Return single-stream decode speed, base and MTP, a table for each device and vLLM."""
    heading = ["profile", "served", "decode, tok/s", "first token, ms", "acceptance", "speed-up"]
    return [
        Block(
            Table(heading, [row for m in group for row in _decode_rows(m, cite)], "llrrrr"),
            measured_on(environment, cite),
            remarks=[_decode_remark(m, cite) for m in group],
        )
        for environment, group in by_environment(inputs.of("decode", "pipeline"))
    ]


def sides(measurement: Measurement) -> list[tuple[str, Node]]:
    """Return what was decoded with: base and MTP, or the one that there is."""
    result = measurement.result
    if measurement.benchmark == "pipeline":
        return [("base", result["base"]), ("with MTP", result["mtp"])]
    ours = "with MTP" if result.get("acceptance") else "without drafting"
    against = result.get("against")
    return [("base", against), (ours, result)] if against else [(ours, result)]


def label(measurement: Measurement) -> Name:
    """Return how a table names the way it was served."""
    if measurement.benchmark == "pipeline":
        return Name(PIPELINE_LABEL)
    return Name(measurement.label)


def speedup(measurement: Measurement, cite: Citations) -> Cited | None:
    """Return MTP's decode speed over the base's, with an interval where there is one."""
    result = measurement.result
    if ratio := result.get("ratio"):
        speed = ratio["decode_tok_s"]
        return cite.show("ratio interval", speed["estimate"], *speed["interval"])
    if measurement.benchmark == "pipeline":
        both = result["decode_tok_s"]
        return cite.show("quotient", both["mtp"], both["base"])
    return None


def verdict(measurement: Measurement, cite: Citations) -> str | None:
    """Return what a comparison with the base found, in one sentence; None without one."""
    found = speedup(measurement, cite)
    if found is None:
        return None
    ratio = measurement.result.get("ratio")
    if ratio is None:
        return f"{label(measurement)}: {found} the base's decode speed, without an interval"
    low, high = ratio["decode_tok_s"]["interval"].value
    if low <= 1 <= high:
        what = "no gain and no loss is shown"
    else:
        what = "faster than the base" if low > 1 else "slower than the base"
    percent = cite.show("whole percentage", ratio["decode_tok_s"]["confidence"])
    return f"{label(measurement)}: {found} the base's decode speed ({percent} % interval): {what}"


def _decode_rows(measurement: Measurement, cite: Citations) -> Iterator[list[str]]:
    found = sides(measurement)
    for name, result in found:
        ratio = speedup(measurement, cite) if name != "base" else None
        reference = "reference" if name == "base" else NOT_MEASURED
        yield [
            label(measurement),
            name,
            _spread(result["decode_tok_s"], cite),
            _spread(result["ttft_ms"], cite),
            _acceptance(result, cite),
            ratio or reference,
        ]


def _spread(node: Node, cite: Citations) -> Cited:
    return cite.show("spread", node["median"], node["min"], node["max"])


def _acceptance(result: Node, cite: Citations) -> str:
    rate = result.get("acceptance")
    if rate is None:
        return NOTHING
    return cite.show("rate spread", rate["median"], rate["min"], rate["max"])


def _decode_remark(measurement: Measurement, cite: Citations) -> str:
    """Return how it was measured, and whether the text stayed the same."""
    result, of = measurement.result, sides(measurement)[-1][1]
    said = [
        f"{cite.show('count', of['num_prompts'])} prompts",
        f"at most {cite.show('count', of['config']['max_tokens'])} tokens each",
        f"{cite.show('count', of['decode_tok_s']['runs'])} rounds, their median (least to most)",
    ]
    if ratio := result.get("ratio"):
        pairs, first = cite.show("count", ratio["decode_tok_s"]["pairs"]), ratio["ttft_ms"]
        slower = cite.show("ratio interval", first["estimate"], *first["interval"])
        said.append(f"base and MTP in turn, {pairs} pairs of sessions")
        said.append(f"time to first token {slower} the base's")
    elif measurement.benchmark == "pipeline":
        said.append("base and MTP served once each, so the speed-up has no interval")
    if length := of.get("acceptance_length"):
        k, steps = cite.show("count", of["k"]), cite.show("two decimals", length)
        rates = cite.show("percents", of["acceptance_by_position"])
        said.append(f"k = {k}, accepted by position {rates} (each given the ones before)")
        said.append(f"{steps} tokens a step")
    if (temperature := of["config"].get("temperature")) is not None and temperature.value:
        said.append(f"temperature {cite.show('plain', temperature)}")
    if (identical := result.get("greedy_identical")) is not None:
        said.append(f"greedy text {_texts(identical, result['divergences'], cite)}")
    return f"{label(measurement)}: {'; '.join(said)}."


def _texts(identical: Node, divergences: Node, cite: Citations) -> str:
    if identical.value:
        return "the same with and without MTP on every prompt"
    if not divergences.value:
        return "the same once, but not in every round"
    return f"another with MTP on {cite.show('length', divergences)} of them"


def profiles(inputs: CardInputs, cite: Citations) -> list[Block]:
    """Return what each profile brings at the largest load that was tried."""
    heading = ["profile", "context", "sequences", "share of memory", "streams", "k",
               "tok/s a stream", "tok/s in all", "for"]  # fmt: skip
    blocks = []
    for environment, group in by_environment(inputs.of("sweep")):
        rows = [_profile_row(inputs, m, cite) for m in group]
        remarks = ["Context, sequences and share of memory are the profile's; `mtp-graft serve` "
                   "fits them to the hardware and says where it does."]  # fmt: skip
        blocks.append(
            Block(Table(heading, rows, "lrrrrrrrl"), measured_on(environment, cite), (), remarks)
        )
    return blocks


def _profile_row(inputs: CardInputs, measurement: Measurement, cite: Citations) -> list[str]:
    points = list(measurement.result["points"])
    most = max(point["concurrency"].value for point in points)
    largest = [point for point in points if point["concurrency"].value == most]
    best = max(largest, key=lambda point: float(point["aggregate_tok_s"].value))
    profile = inputs.profiles.get(measurement.profile or "")
    settings = [NOTHING] * 3
    if profile is not None:
        settings = [
            cite.show("count", profile["max_model_len"]),
            cite.show("count", profile["max_num_seqs"]),
            cite.show("plain", profile["gpu_memory_utilization"]),
        ]
    return [
        label(measurement),
        *settings,
        cite.show("count", best["concurrency"]),
        _k(best, cite),
        _number(best, "per_stream_tok_s", cite),
        _number(best, "aggregate_tok_s", cite),
        Name(profile["why"].value.partition(";")[0]) if profile else NOTHING,
    ]


def scaling(inputs: CardInputs, cite: Citations) -> list[Block]:
    """Return per-stream speed over streams: a table for each device, then each sweep's details."""
    blocks = []
    for environment, group in by_environment(inputs.of("sweep")):
        above = measured_on(environment, cite)
        blocks.append(
            Block(_per_stream(group, cite), above, remarks=list(_sweep_remarks(group, cite)))
        )
    return blocks


def _per_stream(group: Sequence[Measurement], cite: Citations) -> Table:
    """Return streams by profile and k, each cell tokens a second of one stream and of all."""
    columns: dict[str, dict[int, str]] = {}
    counts: dict[int, Cited] = {}
    for measurement in group:
        for point in measurement.result["points"]:
            k = point["k"].value
            name = f"{label(measurement)}, k = {k}" if k is not None else label(measurement)
            streams = point["concurrency"].value
            columns.setdefault(name, {})[streams] = _point(point, cite)
            counts[streams] = cite.show("count", point["concurrency"])
    rows = [
        [counts[n], *(column.get(n, NOT_MEASURED) for column in columns.values())]
        for n in sorted(counts)
    ]
    return Table(["streams", *columns], rows, "r" * (1 + len(columns)))


def _point(point: Node, cite: Citations) -> Cited:
    whole = point["aggregate_tok_s"]
    if point["per_stream_tok_s"].value is None:
        return cite.show("number", whole)
    return cite.show("each, all", point["per_stream_tok_s"], whole)


def _sweep_remarks(group: Sequence[Measurement], cite: Citations) -> Iterator[str]:
    yield "Cells are tokens a second of one stream, and of all streams together."
    for measurement in group:
        name, result = label(measurement), measurement.result
        for dip in result["dips"]:
            streams, smaller = (cite.show("count", dip[key]) for key in ("concurrency", "smaller"))
            of_k = "" if dip["k"].value is None else f", k = {cite.show('count', dip['k'])}"
            yield (
                f"{name}{of_k}: {streams} streams bring less than {smaller}: "
                f"{cite.show('number', dip['aggregate_tok_s'])} against "
                f"{cite.show('number', dip['smaller_aggregate_tok_s'])} tok/s."
            )
        if not result["dips"].value:
            yield f"{name}: more streams never brought fewer tokens a second, intervals apart."
        for k in dict.fromkeys(point["k"].value for point in result["points"]):
            points = [p for p in result["points"] if p["k"].value == k]
            if found := [shown for p in points if (shown := _positions(p, cite))]:
                listed = "; ".join(found)
                yield f"{name}, k = {k}, accepted by position and tokens a step: {listed}."
        if best_k := list(result["best_k"]):
            fastest = ", ".join(_fastest(best, cite) for best in best_k)
            yield f"{name}: the fastest k by streams is {fastest}."
        errors = cite.show("sum", *(point["errors"] for point in result["points"]))
        yield f"{name}: {errors} requests failed and were asked again."


def _positions(point: Node, cite: Citations) -> str | None:
    rates = point.get("acceptance_by_position")
    if rates is None:
        return None
    streams, length = cite.show("count", point["concurrency"]), point["acceptance_length"]
    shown = cite.show("percents", rates), cite.show("two decimals", length)
    return f"{streams} at a time {' and '.join(shown)}"


def _fastest(best: Node, cite: Citations) -> str:
    unclear = "" if best["clear"].value else " (intervals overlap)"
    return (
        f"{cite.show('count', best['concurrency'])}: k = {cite.show('count', best['k'])}{unclear}"
    )


def workload(inputs: CardInputs, cite: Citations) -> list[Block]:
    """Return the everyday requests by category."""
    heading = ["profile", "category", "requests", "tokens", "decode, tok/s", "first token, ms",
               "acceptance", "cut off"]  # fmt: skip
    blocks = []
    for environment, group in by_environment(inputs.of("workload")):
        rows = [row for m in group for row in _workload_rows(m, cite)]
        remarks = []
        for m in group:
            thinking = "on" if m.result["config"]["thinking"].value else "off"
            remarks.append(f"{label(m)}: thinking {thinking}; speeds are means over requests.")
        blocks.append(
            Block(Table(heading, rows, "llrrrrrr"), measured_on(environment, cite), (), remarks)
        )
    return blocks


def _workload_rows(measurement: Measurement, cite: Citations) -> Iterator[list[str]]:
    result = measurement.result
    for category, found in [*result["categories"].items(), ("all", result)]:
        rate = found.get("acceptance")
        yield [
            label(measurement),
            category,
            cite.show("count", found["requests"]),
            cite.show("count", found["completion_tokens"]),
            _number(found, "decode_tok_s", cite),
            _number(found, "ttft_ms", cite),
            cite.show("percent", rate) if rate else NOTHING,
            cite.show("count", found["cut_off"]),
        ]


def _number(of: Node, key: str, cite: Citations) -> str:
    found = of.get(key)
    return NOTHING if found is None else cite.show("number", found)


def _k(point: Node, cite: Citations) -> str:
    k = point.get("k")
    return NOTHING if k is None else cite.show("count", k)
