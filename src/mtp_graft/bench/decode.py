"""Decode speed of one request at a time, and whether speculation changed the greedy text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

from mtp_graft.bench.requests import Answer, Session, time_answer
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import Prompt, ServerClient
from mtp_graft.serving.metrics import SpecDecodeCounters, drafting_result, total

#: Called with what is going on, how much of it is done, and of how much (0: not known).
Report = Callable[[str, int, int], None]
#: Every prompt continued once, one after the other.
Round = Sequence[Answer]
#: Prompts by id, as the token ids that every server gets.
TokenPrompts = Mapping[str, Sequence[int]]
#: Of one prompt: `token_ids`, and `margins`, the log-probability of each less the second best's.
Scored = Mapping[str, Any]


@dataclass(frozen=True)
class DecodeConfig:
    """How long and how often each prompt is continued."""

    max_tokens: int = 128
    rounds: int = 3
    ignore_eos: bool = True  # the same number of tokens from every prompt
    temperature: float = 0.0  # 0: greedy; above, texts are not compared


def tokenize(client: ServerClient, prompts: Sequence[Prompt], session: Session) -> TokenPrompts:
    """Return the prompts as the server's token ids, those of the session's first call."""

    def encode() -> dict[str, list[int]]:
        return {p.id: session.ask(f"tokenize {p.id}", partial(client.encode, p)) for p in prompts}

    return session.measure("prompts", encode)


def measure_rounds(
    client: ServerClient,
    prompts: TokenPrompts,
    config: DecodeConfig,
    report: Report,
    label: str = "decode",
    session: Session | None = None,
) -> list[Round]:
    """Continue all prompts `config.rounds` times, one request at a time, after a warm-up.

    What the session has under this label is not asked for again. Raises GraftError if a prompt
    fails for good.
    """
    session = session or Session()
    asked = {key: value for key, value in asdict(config).items() if key != "rounds"}

    def ask(token_ids: Sequence[int]) -> Answer:
        return time_answer(client, "/v1/completions", {"prompt": list(token_ids), **asked})

    names = unit_names(prompts, config, label)
    report(f"{label}: warm-up", 0, 0)
    session.ask(f"{label}: warm-up", partial(ask, next(iter(prompts.values()))))
    token_ids = [*prompts.values()] * config.rounds
    for done, (name, prompt) in enumerate(zip(names, token_ids, strict=True)):
        report(label, done, len(names))
        session.measure(name, partial(ask, prompt))
    report(label, len(names), len(names))
    return measured_rounds(prompts, config, label, session)


def measure_reference(
    client: ServerClient,
    prompts: TokenPrompts,
    config: DecodeConfig,
    report: Report,
    session: Session,
) -> None:
    """Keep every prompt's greedy continuation with its margins, as `reference/` and its id."""

    def score(token_ids: Sequence[int]) -> dict[str, Any]:
        found = client.score(token_ids, config.max_tokens, ignore_eos=config.ignore_eos)
        return dict(zip(("token_ids", "margins"), found, strict=True))

    for done, (name, token_ids) in enumerate(prompts.items()):
        report("margins", done, len(prompts))
        session.measure(f"reference/{name}", partial(score, token_ids))


def unit_names(prompts: TokenPrompts, config: DecodeConfig, label: str) -> list[str]:
    """Return the names of a measurement's answers in its session, in the order asked."""
    return [f"{label}/{n}/{prompt}" for n in range(config.rounds) for prompt in prompts]


def measured_rounds(
    prompts: TokenPrompts, config: DecodeConfig, label: str, session: Session
) -> list[Round]:
    """Return the rounds of a finished measurement."""
    answers = [session.units[name] for name in unit_names(prompts, config, label)]
    return [answers[n : n + len(prompts)] for n in range(0, len(answers), len(prompts))]


def num_decoded(answer: Answer) -> int:
    """Return the tokens that came after the first chunk (all but one, as a rule)."""
    return len(answer["token_ids"]) - int(answer["chunks"][0][1])


def decode_s(answer: Answer) -> float:
    """Return the seconds between the first and the last chunk."""
    return float(answer["chunks"][-1][0] - answer["chunks"][0][0])


def ttft_s(answer: Answer) -> float:
    """Return the seconds from the request to its first token."""
    return float(answer["chunks"][0][0])


def decode_tok_s(answers: Round) -> float:
    """Return tokens after the first chunks over the time they took, all prompts pooled.

    Raises GraftError if every answer came in a single chunk.
    """
    seconds = sum(map(decode_s, answers))
    if not seconds:
        raise GraftError(
            "every answer of a round came in a single chunk, so there is no decode time to "
            "measure; ask for more tokens or longer answers"
        )
    return sum(map(num_decoded, answers)) / seconds


def decode_result(rounds: Sequence[Round], config: DecodeConfig) -> dict[str, Any]:
    """Return the JSON result of `bench decode`: each quantity over the rounds.

    `repeatable` (the rounds gave the same texts) is None where texts are sampled. Greedy rounds
    repeat each other, so positions are counted on the first alone.
    """
    greedy = config.temperature == 0
    counters = [[_counters(a) for a in answers if a["counters"]] for answers in rounds]
    rates = [rate for c in counters if c and (rate := total(c).acceptance) is not None]
    counted = [c for of_round in (counters[:1] if greedy else counters) for c in of_round]
    texts = [[answer["token_ids"] for answer in answers] for answers in rounds]
    return {
        "decode_tok_s": _spread([decode_tok_s(answers) for answers in rounds]),
        "ttft_ms": _spread([1e3 * median(map(ttft_s, answers)) for answers in rounds]),
        "tpot_ms": _spread([_tpot_ms(answers) for answers in rounds]),
        "acceptance": _spread(rates) if rates else None,
        **drafting_result(total(counted) if counted else None),
        "repeatable": all(text == texts[0] for text in texts) if greedy else None,
        "num_prompts": len(texts[0]),
        "tokens_per_round": sum(map(len, texts[0])),
        "config": asdict(config),
    }


def _counters(answer: Answer) -> SpecDecodeCounters:
    return SpecDecodeCounters(**answer["counters"])


def _tpot_ms(answers: Round) -> float:
    """Return the median over prompts of the time per token after the first chunk."""
    return 1e3 * median(decode_s(a) / num_decoded(a) for a in answers if num_decoded(a))


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": median(values),
        "min": min(values),
        "max": max(values),
        "runs": len(values),
        "values": list(values),
    }


def measure_base(
    client: ServerClient,
    prompts: Sequence[Prompt],
    config: DecodeConfig,
    report: Report,
) -> dict[str, Any]:
    """Decode `prompts` greedily without a head; return what `measure_mtp` and `compare` need of it.

    Keys: `prompts` (token ids by id), `reference` (greedy texts with margins, by id), `result` (as
    `bench decode`) and `stream` (as `median_round`).
    """
    session = Session()
    token_prompts = tokenize(client, prompts, session)
    measure_reference(client, token_prompts, config, report, session)
    rounds = measure_rounds(client, token_prompts, config, report, "base: decode")
    return {
        "prompts": token_prompts,
        **base_result(rounds, config, session),
        "stream": median_round(rounds),
    }


def base_result(rounds: Sequence[Round], config: DecodeConfig, session: Session) -> dict[str, Any]:
    """Return `result` and `reference` of a base; it repeats itself if it gave its reference, too.

    `reference` is None where texts are sampled.
    """
    result = decode_result(rounds, config)
    if config.temperature:
        return {"result": result, "reference": None}
    prompts = session.units["prompts"]
    reference = {name: session.units[f"reference/{name}"] for name in prompts}
    texts = [answer["token_ids"] for answer in rounds[0]]
    result["repeatable"] &= not find_divergences(reference, texts)
    return {"result": result, "reference": reference}


def measure_mtp(
    client: ServerClient, base: Mapping[str, Any], config: DecodeConfig, report: Report
) -> dict[str, Any]:
    """Decode the base's prompts with a head; return `texts` (token ids), `result` and `stream`."""
    rounds = measure_rounds(client, base["prompts"], config, report, "MTP: decode")
    return {
        "texts": [answer["token_ids"] for answer in rounds[0]],
        "result": decode_result(rounds, config),
        "stream": median_round(rounds),
    }


def median_round(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return every answer of the round with the median speed, chunk by chunk.

    Keys: `round` (from 1), `rounds` and `timed` (the answers, in the prompts' order). Of an even
    number of rounds it is the slower one of the two in the middle.
    """
    by_speed = sorted(range(len(rounds)), key=lambda number: decode_tok_s(rounds[number]))
    number = by_speed[(len(rounds) - 1) // 2]
    return {"round": number + 1, "rounds": len(rounds), "timed": rounds[number]}


def compare(base: Mapping[str, Any], mtp: Mapping[str, Any]) -> dict[str, Any]:
    """Return both results and how the greedy texts differ; null where they are sampled.

    Keys: `base` and `mtp` (as `bench decode`), `acceptance`, `decode_tok_s`, `greedy_identical`,
    `divergences`.
    """
    results = {"base": base["result"], "mtp": mtp["result"]}
    acceptance = results["mtp"]["acceptance"]
    identical, divergences = None, None
    if base["reference"] is not None:
        divergences = find_divergences(base["reference"], mtp["texts"])
        identical = not divergences and all(r["repeatable"] for r in results.values())
    return {
        "acceptance": acceptance and acceptance["median"],
        "decode_tok_s": {name: r["decode_tok_s"]["median"] for name, r in results.items()},
        "greedy_identical": identical,
        "divergences": divergences,
        **results,
    }


def find_divergences(
    reference: Mapping[str, Scored], texts: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Return where greedy texts, in the prompts' order, leave the base's.

    Keys: `prompt`, `position` (of the first token that differs) and `margin` (the base's there;
    None past its last token).
    """
    divergences = []
    for (prompt, scored), text in zip(reference.items(), texts, strict=True):
        position = shared_length(scored["token_ids"], text)
        if position < max(len(scored["token_ids"]), len(text)):
            margins = [*scored["margins"], None]
            divergences.append(
                {"prompt": prompt, "position": position, "margin": margins[position]}
            )
    return divergences


def shared_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many items two sequences begin with that are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
