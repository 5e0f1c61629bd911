"""Decode speed of one request at a time, of two servers in turn; acceptance on texts already known.

A turn is one start of a server on which every prompt is continued; it is kept as a whole.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product, zip_longest
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mtp_graft.bench.intervals import paired_ratio
from mtp_graft.checkpoint.capture import FinishedText
from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.manifest import read_result
from mtp_graft.errors import GraftError, translated
from mtp_graft.serving import metrics
from mtp_graft.serving.client import COUNT_DRAFTS, READ_ERRORS, Prompt, ServerClient
from mtp_graft.serving.metrics import SpecDecodeCounters, Step
from mtp_graft.serving.server import Report

STREAM = {"stream": True, "stream_options": {"include_usage": True}}
#: Any other reason (abort, error) leaves an answer that is not the model's.
WHOLE_REASONS = ("stop", "length", "tool_calls")

Answer = dict[str, Any]  # streamed; JSON as `time_answer` returns it
Round = Sequence[Answer]  # every prompt continued once, one after the other
Turn = Mapping[str, Any]  # JSON as `measure_turn` returns it
#: What is asked of every server, and how.
Asked = tuple[Sequence[Prompt], "DecodeConfig"]
#: Starts a server, or finds one that runs, for a turn of this name.
Serve = Callable[[str], AbstractContextManager[ServerClient]]


@dataclass(frozen=True)
class DecodeConfig:
    """How long and how often each prompt is continued."""

    max_tokens: int
    rounds: int  # of all prompts, or of requests at a time
    ignore_eos: bool = True  # the same number of tokens from every prompt
    temperature: float = 0.0  # 0: greedy; above, texts are not compared


def measure_turn(
    client: ServerClient,
    prompts: Mapping[str, Sequence[int]],
    config: DecodeConfig,
    report: Report,
    name: str = "decode",
    *,
    with_margins: bool = False,
) -> dict[str, Any]:
    """Continue all prompts `config.rounds` times, one request at a time, after a warm-up.

    `prompts` are token ids by id. Keys: `prompts`, `rounds` (of answers, in the prompts' order)
    and `reference`: each prompt's greedy continuation and its margins (the log-probability of
    each token less the second best's), null unless asked for. Raises GraftError if a request fails.
    """
    options = {name: value for name, value in asdict(config).items() if name != "rounds"}

    def ask(token_ids: Sequence[int]) -> Answer:
        return time_answer(client, "/v1/completions", {"prompt": list(token_ids), **options})

    report(f"{name}: warm-up", 0, 0)
    ask(next(iter(prompts.values())))
    rounds: list[list[Answer]] = [[] for _ in range(config.rounds)]
    for done, (answers, token_ids) in enumerate(product(rounds, prompts.values())):
        report(name, done, config.rounds * len(prompts))
        answers.append(ask(token_ids))
    reference: dict[str, Any] = {}
    for prompt, token_ids in prompts.items() if with_margins else ():
        report(f"{name}: margins", 0, 0)
        tokens, margins = client.score(token_ids, config.max_tokens, ignore_eos=config.ignore_eos)
        reference[prompt] = {"token_ids": tokens, "margins": margins}
    return {"prompts": dict(prompts), "rounds": rounds, "reference": reference or None}


def measure_alternating(
    serve: Mapping[str, Serve], asked: Asked, pairs: int, report: Report, folder: Path
) -> dict[str, Any]:
    """Measure turns in the order base, MTP, MTP, base, base, ...; return as `compare`.

    `serve` has `base` and `mtp`. Turns that `folder` has are neither served nor measured again.
    """
    turns: dict[str, list[Turn]] = {"base": [], "mtp": []}
    for pair in range(1, pairs + 1):
        for side in ("base", "mtp") if pair % 2 else ("mtp", "base"):
            measure = partial(serve_turn, serve[side], asked, report, f"{side}-{pair}")
            turns[side].append(measured(folder, f"{side}-{pair}", measure))
    return compare(turns["base"], turns["mtp"], asked[1]) | {"pairs": pairs}


def serve_turn(serve: Serve, asked: Asked, report: Report, name: str = "decode") -> dict[str, Any]:
    """Serve for one turn and measure it."""
    prompts, config = asked
    with serve(name) as client:
        token_ids = {prompt.id: client.encode(prompt) for prompt in prompts}
        with_margins = name == "base-1" and config.temperature == 0
        return measure_turn(client, token_ids, config, report, name, with_margins=with_margins)


def compare(base: Sequence[Turn], mtp: Sequence[Turn], config: DecodeConfig) -> dict[str, Any]:
    """Return the turns of a comparison as JSON.

    Keys: those of `decode_result` for MTP, `against` (the same for the base), `ratio` (null for a
    single pair), `greedy_identical` and `divergences` [{`prompt`, `position` of the first token
    that differs, `margin` of the base there}] (both null where texts are sampled).
    """
    identical = divergences = None
    if reference := base[0]["reference"]:
        divergences = list(_divergences(reference, mtp[0]["rounds"][0]))
        expected = [list(scored["token_ids"]) for scored in reference.values()]
        rounds = [answers for turn in (*base, *mtp) for answers in turn["rounds"]]
        identical = all([a["token_ids"] for a in answers] == expected for answers in rounds)
    return {
        **decode_result(mtp, config),
        "against": decode_result(base, config),
        "ratio": _ratios(base, mtp) if len(base) > 1 else None,
        "greedy_identical": identical,
        "divergences": divergences,
    }


def _ratios(base: Sequence[Turn], mtp: Sequence[Turn]) -> dict[str, Any]:
    """Return the ratios MTP / base, the rounds of a turn pooled; answers in one chunk left out."""
    sides = [[turn["rounds"] for turn in side] for side in (mtp, base)]
    timings = [[[list(map(timing, r)) for r in turn] for turn in side] for side in sides]
    ttft_s, seconds, tokens = np.moveaxis(np.array(timings), -1, 0)  # [2, Q, R, P] each
    seconds, tokens = seconds.sum(axis=2), tokens.sum(axis=2)  # [2, Q, P]
    decoded = (tokens > 0).all(axis=(0, 1))  # [P]
    return {
        "decode_tok_s": paired_ratio(*(tokens[..., decoded] / seconds[..., decoded])),
        "ttft_ms": paired_ratio(*np.median(ttft_s, axis=2)),
    }


def decode_result(turns: Sequence[Turn], config: DecodeConfig) -> dict[str, Any]:
    """Return `bench decode`'s JSON; by position on the first greedy round: others repeat it."""
    rounds: list[Round] = [answers for turn in turns for answers in turn["rounds"]]
    by_round = [_drafts([answers]) for answers in rounds]
    rates = [c.acceptance for c in by_round if c and c.acceptance is not None]
    return {
        "decode_tok_s": _spread([decode_tok_s(answers) for answers in rounds]),
        "ttft_ms": _spread([1e3 * median(timing(a)[0] for a in answers) for answers in rounds]),
        "tpot_ms": _spread(
            [median(1e3 * s / n for _, s, n in map(timing, a) if n) for a in rounds]
        ),
        "acceptance": _spread(rates) if rates else None,
        **metrics.drafting_result(_drafts(rounds if config.temperature else rounds[:1])),
        "num_prompts": len(rounds[0]),
        "tokens_per_round": sum(len(answer["token_ids"]) for answer in rounds[0]),
        "config": asdict(config),
    }


def _drafts(rounds: Sequence[Round]) -> SpecDecodeCounters | None:
    """Return the sum of what the server counted; None if it does not draft."""
    counters = [answer["counters"] for answers in rounds for answer in answers]
    counted = [SpecDecodeCounters(**c) for c in counters if c]
    return metrics.total(counted) if counted else None


def decode_tok_s(answers: Round) -> float:
    """Return tokens after the first chunks over the time they took, all prompts pooled."""
    _, seconds, tokens = map(sum, zip(*map(timing, answers), strict=True))
    if not seconds:
        problem = "every answer of a round came in a single chunk, so there is no decode time"
        raise GraftError(f"{problem} to measure; ask for more tokens or longer answers")
    return tokens / seconds


def _spread(values: list[float]) -> dict[str, Any]:
    ends = {"median": median(values), "min": min(values), "max": max(values)}
    return {**ends, "runs": len(values), "values": values}


def _divergences(reference: Mapping[str, Any], answers: Round) -> Iterator[dict[str, Any]]:
    """Yield where greedy texts leave the base's; past its end there is no margin."""
    for (prompt, scored), answer in zip(reference.items(), answers, strict=True):
        if (position := first_difference(scored["token_ids"], answer["token_ids"])) is not None:
            margin = [*scored["margins"], None][position]
            yield {"prompt": prompt, "position": position, "margin": margin}


def first_difference(one: Iterable[int], other: Iterable[int]) -> int | None:
    """Return where two texts differ, which may be the end of the shorter one; None if nowhere."""
    pairs = enumerate(zip_longest(one, other))
    return next((position for position, (a, b) in pairs if a != b), None)


# One answer, and results that are kept; other benchmarks share them


def measured(folder: Path, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a part of a benchmark: from `folder` if an earlier call kept it, else measured now."""
    path = folder / f"{name}.json"
    found = read_result(path)
    if found is None:
        found = measure()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(found, path)
    return found


def time_answer(client: ServerClient, path: str, body: Mapping[str, Any]) -> Answer:
    """Stream the answer to a completion or a chat; return its tokens, times and drafts.

    Keys: `token_ids`; `finish_reason`; `chunks`, [seconds since the request, number of tokens]
    each; `texts`, what each chunk adds; `prompt_tokens`; `completion_tokens`; `counters`, null
    without drafts. Raises GraftError for an answer that is not whole or cannot be read.
    """
    before = client.spec_decode_counters()
    answer = read_answer(client, path, {**body, **STREAM, "return_token_ids": True})
    arrived, counted = len(answer["token_ids"]), answer.get("completion_tokens")
    if (reason := answer["finish_reason"]) not in WHOLE_REASONS or not 0 < arrived == counted:
        ended = f"{arrived} tokens (reason {reason!r}, {counted} by the server's count)"
        expected = f"all tokens, at least one, and a reason out of {', '.join(WHOLE_REASONS)}"
        raise GraftError(f"{client.base_url}: the stream ended after {ended}; expected {expected}")
    after = client.spec_decode_counters()
    counters = None if before is None or after is None else asdict(after - before)
    return answer | {"counters": counters}


def read_answer(
    client: ServerClient, path: str, body: dict[str, Any], hang_up_after: int = 0
) -> Answer:
    """Return an answer, streamed or not, whole or not, or so many chunks of it.

    Keys: those of `time_answer` but for `counters`, and where there are any `reasoning`, `calls`
    by index, [name, arguments] each, and `logprobs` of the best tokens.
    """
    answer: Answer = {"token_ids": [], "finish_reason": None, "chunks": [], "texts": []}
    started = time.perf_counter()
    with (
        translated(f"{client.base_url}{path}: not an answer of vLLM's", *READ_ERRORS),
        closing(client.events(path, body)) as events,
    ):
        for event in events:
            _add_event(answer, event, time.perf_counter() - started)
            if hang_up_after and len(answer["chunks"]) >= hang_up_after:
                break
    return answer


def _add_event(answer: Answer, event: Mapping[str, Any], arrived_s: float) -> None:
    if usage := event.get("usage"):
        answer |= {key: usage[key] for key in ("prompt_tokens", "completion_tokens")}
        answer["total_tokens"] = usage.get("total_tokens")
    for choice in event["choices"]:  # none in the last event, which has the counts alone
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        if new := choice.get("token_ids"):
            answer["token_ids"] += new
            answer["chunks"].append([arrived_s, len(new)])
            answer["texts"].append("")
        if (text := said.get("content")) and answer["texts"]:  # or the rest of a character
            answer["texts"][-1] += text
        if reasoning := said.get("reasoning"):
            answer["reasoning"] = answer.get("reasoning", "") + reasoning
        for number, call in enumerate(said.get("tool_calls") or ()):
            whole = answer.setdefault("calls", {}).setdefault(call.get("index", number), ["", ""])
            for place, part in enumerate(("name", "arguments")):
                whole[place] += call["function"].get(part) or ""
        for place in (choice.get("logprobs") or {}).get("content") or ():
            tops = {top["token"]: top["logprob"] for top in (place, *place["top_logprobs"])}
            answer.setdefault("logprobs", []).append(tops)
        answer["finish_reason"] = choice.get("finish_reason") or answer["finish_reason"]


def timing(answer: Answer) -> tuple[float, float, int]:
    """Return seconds to the first chunk, from there to the last, and the tokens that came after."""
    (first_s, first_size), (last_s, _) = answer["chunks"][0], answer["chunks"][-1]
    return first_s, last_s - first_s, len(answer["token_ids"]) - first_size


# Acceptance, on texts whose ending is known


def measure_acceptance(
    client: ServerClient,
    texts: Sequence[FinishedText],
    max_tokens: int,
    concurrency: int,
    report: Report,
    label: str = "acceptance",
) -> dict[str, Any]:
    """Have every text continued again, with drafts, until it ends; return what was accepted.

    The server was started with COUNT_DRAFTS. Keys: `acceptance`, `accepted`, `drafted`, `interval`
    (95 %, Wilson), those of `drafting_result`, `texts`, `identical` (continuations equal to the
    captured ones; with several requests in a step sums round in another order) and `sequences`
    (`id`, `drafts`, first ones of a step, `accepted`, `steps`). GraftError if nothing is drafted.
    """
    steps, identical = dict[str, list[Step]](), 0
    report(label, 0, len(texts))
    with ThreadPool(concurrency) as pool:  # whose threads do not keep Ctrl-C waiting
        answers = pool.imap(lambda text: client.complete_counted(text.prompt, max_tokens), texts)
        for text, (answer, told) in zip(texts, answers, strict=True):
            steps[text.id] = list(_drafting_steps(told, len(answer)))
            identical += answer == text.continuation
            report(label, len(steps), len(texts))
    counters = metrics.count_steps([step for of_text in steps.values() for step in of_text])
    accepted, drafted = counters.num_accepted_tokens, counters.num_draft_tokens
    if not drafted:
        cure = f"serve a head with k >= 1 and {' '.join(COUNT_DRAFTS)}"
        raise GraftError(f"{client.base_url}: tells of no drafts; {cure}")
    firsts = {name: sum(step.accepted > 0 for step in found) for name, found in steps.items()}
    return {
        "acceptance": accepted / drafted,
        "accepted": accepted,
        "drafted": drafted,
        "interval": list(metrics.wilson_interval(accepted, drafted)),
        **metrics.drafting_result(counters),
        "texts": len(texts),
        "identical": identical,
        "sequences": [
            {"id": name, "drafts": len(found), "accepted": firsts[name], "steps": found}
            for name, found in steps.items()
        ],
    }


def _drafting_steps(steps: Sequence[Step], num_tokens: int) -> Iterator[Step]:
    """Yield the steps with drafts that made a text of `num_tokens`, without drafts past its end."""
    left = num_tokens - 1  # the first comes with the prompt
    for step in steps:
        if min(step.drafted, left):
            yield Step(min(step.drafted, left), min(step.accepted, left))
        left -= step.accepted + 1
