"""The card's sections on quality: how often drafts are accepted, and benchmark scores."""

from collections.abc import Iterator, Sequence

from mtp_graft.bench.card.cite import Citations, Name, Node
from mtp_graft.bench.card.collect import (
    EVALS,
    CardInputs,
    Measurement,
    by_environment,
    environment_of,
)
from mtp_graft.bench.card.speed import measured_on
from mtp_graft.bench.card.tables import Block, Table
from mtp_graft.bench.charts import in_order
from mtp_graft.bench.markdown import NOT_MEASURED, NOTHING, count

TITLES = {"gsm8k": "GSM8K", "humaneval": "HumanEval", "mmlu": "MMLU", "capability": "Capability"}
_PROTOCOLS = {
    "gsm8k": "greedy, step by step, exact match on `#### N`",
    "humaneval": "pass@1, greedy, unit tests in a sandbox",
    "mmlu": "greedy, subjects in turn, room to reason",
    "capability": "our own tasks, each judged by a program",
}
_SETTINGS = {
    "max_tokens": "at most {} tokens an answer",
    "seed": "seed {}",
    "concurrency": "{} at a time",
}


def acceptance(inputs: CardInputs, cite: Citations) -> list[Block]:
    """Return how often each head of the run was accepted, served and offline."""
    scored = inputs.stages["score"]["acceptance"] if "score" in inputs.stages else None
    offline = dict(scored.items()) if scored is not None else {}
    variants = in_order({**inputs.served, **offline})
    if not variants:
        return []
    rows = [
        [
            Name(variant),
            "yes" if variant == inputs.spliced.variant else "",
            *_served(inputs.served.get(variant), cite),
            *_offline(offline.get(variant), cite),
        ]
        for variant in variants
    ]
    heading = ["head", "this one", "k", "served, by position", "first draft, 95 %",
               "first drafts accepted", "tokens a step", "offline", "95 %",
               "drafts accepted"]  # fmt: skip
    above = measured_on(environment_of(inputs.manifests.get("bench")), cite)
    remarks = [
        "Served is what vLLM counted on held-out texts with k drafts a step, each position given "
        "that all before it were accepted; offline is the head's walk over captured texts, one "
        "draft a step, before anything was served. Intervals are Wilson's."
    ]
    return [Block(Table(heading, rows, "llrrrrrrrr"), above, (), remarks)]


def _served(found: Node | None, cite: Citations) -> list[str]:
    if found is None:
        return [NOTHING, NOT_MEASURED, NOTHING, NOTHING, NOTHING]
    return [
        cite.show("count", found["k"]),
        cite.show("percents", found["acceptance_by_position"]),
        cite.show("rate interval", *found["acceptance_by_position_interval"][0]),
        cite.show("part", found["accepted_by_position"][0], found["steps"]),
        cite.show("two decimals", found["acceptance_length"]),
    ]


def _offline(found: Node | None, cite: Citations) -> list[str]:
    if found is None:
        return [NOT_MEASURED, NOTHING, NOTHING]
    return [
        cite.show("percent", found["top1"]),
        cite.show("rate interval", *found["interval"]),
        cite.show("part", found["accepted"], found["tokens"]),
    ]


def scores(inputs: CardInputs, cite: Citations) -> list[Block]:
    """Return the benchmark snapshot, with sample sizes, intervals and classified failures."""
    heading = ["benchmark", "protocol", "right", "score", "95 % interval", "failures"]
    return [
        Block(
            Table(heading, [_score_row(m, cite) for m in group], "llrrrl"),
            measured_on(environment, cite),
            remarks=[*(_settings(m, cite) for m in group), *_without_any(group)],
        )
        for environment, group in by_environment(inputs.of(*EVALS))
    ]


def _without_any(group: Sequence[Measurement]) -> list[str]:
    """Return what to make of scores that are all 0."""
    if any(m.result["correct"].value for m in group):
        return []
    return [
        "No answer was right in any of them: they show that the benchmarks run, not whether the "
        "head changes the answers."
    ]


def _score_row(measurement: Measurement, cite: Citations) -> list[str]:
    result = measurement.result
    return [
        Name(TITLES[measurement.benchmark]),
        Name(_PROTOCOLS[measurement.benchmark]),
        cite.show("part", result["correct"], result["total"]),
        cite.show("percent", result["score"]),
        cite.show("rate interval", *result["interval"]),
        cite.show("kinds", result["kinds"]),
    ]


def _settings(measurement: Measurement, cite: Citations) -> str:
    result = measurement.result
    settings = result["settings"]
    thinking = settings.get("thinking")
    said = [f"thinking {'on' if thinking and thinking.value else 'off'}"]
    said += [
        what.format(cite.show("count", node))
        for key, what in _SETTINGS.items()
        if (node := settings.get(key)) is not None
    ]
    retried = sum(result["retried"].value.values())
    asked = cite.show("sum", *(node for _, node in result["retried"].items()))
    again = (
        f"; {asked} {count(retried, 'request').partition(' ')[2]} asked again" if retried else ""
    )
    seconds = cite.show("number", result["seconds"])
    return f"{TITLES[measurement.benchmark]}: {', '.join(said)}; {seconds} s{again}."


def missing(inputs: CardInputs) -> Iterator[str]:
    """Yield what the run has no result of."""
    if not any(m.result.get("ratio") for m in inputs.of("decode")):
        yield "decode speed against the base with servers in turn (`bench decode --against`)"
    for name, what in {
        "sweep": "speed with several streams (`bench sweep`)",
        "workload": "everyday requests (`bench workload`)",
        **{name: f"{TITLES[name]} (`bench {name}`)" for name in EVALS},
    }.items():
        if not inputs.of(name):
            yield what
    if not inputs.served:
        yield "served acceptance (the run's own bench stage)"
    if inputs.verify is None:
        yield "verification"
