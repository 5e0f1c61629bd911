"""Single-stream decode speed, and whether speculative decoding changed the greedy text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from mtp_graft.bench.drafting import pooled_drafting
from mtp_graft.bench.intervals import bootstrap_median, bootstrap_pooled
from mtp_graft.bench.ledger import Ledger
from mtp_graft.bench.streams import Retrying, stream_whole
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import Completion, ScoredCompletion, ServerClient
from mtp_graft.serving.metrics import SpecDecodeCounters
from mtp_graft.serving.prompts import ChatPrompt, Prompt

#: Called with what is going on, how much of it is done, and of how much (0: not known).
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DecodeConfig:
    """How long and how often each prompt is continued."""

    max_tokens: int = 128
    rounds: int = 3
    ignore_eos: bool = True  # the same number of tokens from every prompt
    temperature: float = 0.0  # 0: greedy; above, texts are not compared

    @property
    def is_greedy(self) -> bool:
        """Return whether the same prompt should get the same text every time."""
        return self.temperature == 0


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the token ids that every server gets."""

    id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Timed:
    """One continuation, and what the server drafted for it (None without MTP)."""

    completion: Completion
    counters: SpecDecodeCounters | None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON that `from_dict` reads; times count from the request."""
        done = self.completion
        return {
            "token_ids": list(done.token_ids),
            "finish_reason": done.finish_reason,
            "chunks": [[arrived - done.started_s, size] for arrived, size in done.chunks],
            "texts": list(done.texts),
            "counters": self.counters and asdict(self.counters),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Timed":
        """Return what `as_dict` wrote."""
        chunks = tuple((arrived, size) for arrived, size in found["chunks"])
        tokens, texts = tuple(found["token_ids"]), tuple(found.get("texts", ()))  # once not kept
        completion = Completion(tokens, found["finish_reason"], 0.0, chunks, texts)
        counted = found["counters"]
        if counted is None:
            return cls(completion, None)
        positions = tuple(counted["accepted_per_position"])
        return cls(completion, SpecDecodeCounters(**counted | {"accepted_per_position": positions}))


@dataclass(frozen=True)
class Round:
    """Every prompt continued once, one after the other."""

    timed: tuple[Timed, ...]

    @property
    def completions(self) -> tuple[Completion, ...]:
        """Return the continuations with their times, in the prompts' order."""
        return tuple(timed.completion for timed in self.timed)

    @property
    def token_ids(self) -> tuple[tuple[int, ...], ...]:
        """Return the continuations, in the prompts' order."""
        return tuple(completion.token_ids for completion in self.completions)

    @property
    def counters(self) -> tuple[SpecDecodeCounters, ...]:
        """Return what was drafted for each prompt; empty without MTP."""
        return tuple(timed.counters for timed in self.timed if timed.counters is not None)

    @property
    def decode_tok_s(self) -> float:
        """Return tokens after the first chunks over the time they took, all prompts pooled."""
        return sum(c.num_decoded for c in self.completions) / sum(
            c.decode_s for c in self.completions
        )

    @property
    def ttft_ms(self) -> float:
        """Return the median time to first token."""
        return 1e3 * median(c.ttft_s for c in self.completions)

    @property
    def tpot_ms(self) -> float:
        """Return the median over prompts of the time per token after the first chunk."""
        return 1e3 * median(c.decode_s / c.num_decoded for c in self.completions if c.num_decoded)


@dataclass(frozen=True)
class Divergence:
    """The first position at which two greedy continuations of a prompt differ."""

    prompt: str
    position: int
    margin: float | None  # the base's logprob margin there; None past the base's last token


def tokenize(
    client: ServerClient, prompts: Sequence[Prompt | ChatPrompt], retrying: Retrying
) -> list[TokenPrompt]:
    """Return the prompts as the server's token ids."""
    encoded = [retrying.ask(f"tokenize {p.id}", partial(client.encode, p)) for p in prompts]
    return [TokenPrompt(p.id, tuple(ids)) for p, ids in zip(prompts, encoded, strict=True)]


def measure_decode(
    client: ServerClient,
    prompts: Sequence[TokenPrompt],
    config: DecodeConfig,
    report: Report,
    label: str = "decode",
    *,
    ledger: Ledger | None = None,
    retrying: Retrying | None = None,
) -> list[Round]:
    """Continue all prompts `config.rounds` times, one request at a time, after a warm-up.

    Continuations in `ledger` under this label are not asked for again. Raises GraftError if a
    prompt fails for good, or if a round continues no prompt by more than one chunk of tokens.
    """
    ledger, retrying = ledger or Ledger(), retrying or Retrying()

    def ask(prompt: TokenPrompt) -> Timed:
        before = client.spec_decode_counters()
        completion = stream_whole(
            client,
            prompt.token_ids,
            config.max_tokens,
            ignore_eos=config.ignore_eos,
            temperature=config.temperature,
        )
        after = client.spec_decode_counters()
        return Timed(completion, None if before is None or after is None else after - before)

    report(f"{label}: warm-up", 0, 0)
    retrying.ask(f"{label}: warm-up", partial(ask, prompts[0]))
    names = unit_names(prompts, config, label)
    for done, (name, prompt) in enumerate(zip(names, [*prompts] * config.rounds, strict=True)):
        report(label, done, len(names))
        if name not in ledger:
            ledger.add(name, retrying.ask(name, partial(ask, prompt)).as_dict())
    report(label, len(names), len(names))
    return rounds_of(ledger, names, len(prompts))


def measure_kept(
    client: Callable[[], ServerClient],
    prompts: Sequence[Prompt | ChatPrompt],
    config: DecodeConfig,
    report: Report,
    ledger: Ledger,
    retrying: Retrying,
) -> list[Round]:
    """Measure what the ledger does not have; `client` is called only if that is something."""
    label = "decode"
    if "prompts" in ledger:
        known = kept_prompts(ledger)
        names = unit_names(known, config, label)
        if all(name in ledger for name in names):
            return rounds_of(ledger, names, len(known))
    server = client()
    if "prompts" not in ledger:
        ledger.add("prompts", [asdict(prompt) for prompt in tokenize(server, prompts, retrying)])
    known = kept_prompts(ledger)
    return measure_decode(server, known, config, report, label, ledger=ledger, retrying=retrying)


def kept_prompts(ledger: Ledger) -> list[TokenPrompt]:
    """Return the prompts that a ledger's measurement began with."""
    return [TokenPrompt(p["id"], tuple(p["token_ids"])) for p in ledger["prompts"]]


def unit_names(prompts: Sequence[TokenPrompt], config: DecodeConfig, label: str) -> list[str]:
    """Return the names of a measurement's continuations in its ledger, in the order asked."""
    return [f"{label}/{n}/{prompt.id}" for n in range(config.rounds) for prompt in prompts]


def rounds_of(ledger: Ledger, names: Sequence[str], num_prompts: int) -> list[Round]:
    """Return the rounds that a ledger holds under these names.

    Raises GraftError if every answer of a round came in a single chunk.
    """
    rounds = []
    for start in range(0, len(names), num_prompts):
        one = Round(tuple(Timed.from_dict(ledger[n]) for n in names[start : start + num_prompts]))
        if not any(completion.num_decoded for completion in one.completions):
            raise GraftError(
                f"{names[start]} and the round's other answers are each a single chunk, so there "
                "is no decode time to measure; ask for more tokens or longer answers"
            )
        rounds.append(one)
    return rounds


def score_greedy(
    client: ServerClient,
    prompts: Sequence[TokenPrompt],
    config: DecodeConfig,
    report: Report,
    label: str = "margins",
) -> list[ScoredCompletion]:
    """Return every prompt's greedy continuation with its margins; it warms the server up too."""
    scored = []
    for done, prompt in enumerate(prompts):
        report(label, done, len(prompts))
        scored.append(
            client.score(prompt.token_ids, config.max_tokens, ignore_eos=config.ignore_eos)
        )
    return scored


def find_divergences(
    prompts: Sequence[TokenPrompt],
    base: Sequence[ScoredCompletion],
    other: Sequence[tuple[int, ...]],
) -> list[Divergence]:
    """Compare continuations with the base's, prompt by prompt."""
    divergences = []
    for prompt, reference, tokens in zip(prompts, base, other, strict=True):
        if tokens == reference.token_ids:
            continue
        position = shared_length(reference.token_ids, tokens)
        known = position < len(reference.margins)
        margin = reference.margins[position] if known else None
        divergences.append(Divergence(prompt.id, position, margin))
    return divergences


def shared_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many items two sequences begin with that are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def decode_result(rounds: Sequence[Round], config: DecodeConfig) -> dict[str, Any]:
    """Return the JSON result of `bench decode`: each quantity over the rounds.

    `repeatable` (the rounds gave the same texts) is None where texts are sampled.
    """
    same = all(r.token_ids == rounds[0].token_ids for r in rounds)
    return {
        **_speeds(rounds),
        "acceptance": _acceptance(rounds),
        **pooled_drafting([r.counters for r in rounds]),
        "repeatable": same if config.is_greedy else None,
        "num_prompts": len(rounds[0].timed),
        "tokens_per_round": sum(len(tokens) for tokens in rounds[0].token_ids),
        "config": asdict(config),
    }


def _speeds(rounds: Sequence[Round]) -> dict[str, Any]:
    table = [r.completions for r in rounds]
    tokens = np.array([[c.num_decoded for c in row] for row in table], dtype=float)  # [R, P]
    seconds = np.array([[c.decode_s for c in row] for row in table])
    ttft_ms = 1e3 * np.array([[c.ttft_s for c in row] for row in table])
    decoded = tokens.all(axis=0)  # a prompt that is answered in one chunk has no time per token
    tpot_ms = 1e3 * seconds[:, decoded] / tokens[:, decoded]
    return {
        "decode_tok_s": _spread(
            [r.decode_tok_s for r in rounds], bootstrap_pooled(tokens, seconds)
        ),
        "ttft_ms": _spread([r.ttft_ms for r in rounds], bootstrap_median(ttft_ms)),
        "tpot_ms": _spread([r.tpot_ms for r in rounds], bootstrap_median(tpot_ms)),
    }


def _acceptance(rounds: Sequence[Round]) -> dict[str, Any] | None:
    """Return accepted over drafted tokens; None if nothing was drafted."""
    table = [r.counters for r in rounds]
    drafted = np.array([[c.num_draft_tokens for c in row] for row in table], dtype=float)
    accepted = np.array([[c.num_accepted_tokens for c in row] for row in table], dtype=float)
    if not drafted.size or not drafted.sum(axis=1).all():
        return None
    rates = (accepted.sum(axis=1) / drafted.sum(axis=1)).tolist()
    return _spread(rates, bootstrap_pooled(accepted, drafted))


def _spread(values: Sequence[float], interval: tuple[float, float]) -> dict[str, Any]:
    """Return a quantity over the rounds; the interval is that of the median."""
    return {
        "median": median(values),
        "min": min(values),
        "max": max(values),
        "runs": len(values),
        "values": list(values),
        "interval": list(interval),
    }


def measure_base(
    client: ServerClient,
    prompts: Sequence[Prompt | ChatPrompt],
    config: DecodeConfig,
    report: Report,
) -> dict[str, Any]:
    """Decode `prompts` without a head; return what `measure_mtp` and `compare` need of it.

    Keys: `prompts` ([{id, token_ids}]), `reference` (greedy texts with margins), `result` (as
    `bench decode`) and `stream` (as `median_round`). JSON all of it, so that a killed run need not
    measure the base again.
    """
    token_prompts = tokenize(client, prompts, Retrying())
    reference = score_greedy(client, token_prompts, config, report, "base: margins")
    rounds = measure_decode(client, token_prompts, config, report, "base: decode")
    result = decode_result(rounds, config)
    result["repeatable"] &= rounds[0].token_ids == tuple(scored.token_ids for scored in reference)
    return {
        "prompts": [asdict(prompt) for prompt in token_prompts],
        "reference": [asdict(scored) for scored in reference],
        "result": result,
        "stream": median_round(rounds),
    }


def measure_mtp(
    client: ServerClient, base: Mapping[str, Any], config: DecodeConfig, report: Report
) -> dict[str, Any]:
    """Decode the base's prompts with a head; return `result`, `texts` (token ids) and `stream`."""
    prompts = [TokenPrompt(p["id"], tuple(p["token_ids"])) for p in base["prompts"]]
    rounds = measure_decode(client, prompts, config, report, "MTP: decode")
    return {
        "texts": [list(tokens) for tokens in rounds[0].token_ids],
        "result": decode_result(rounds, config),
        "stream": median_round(rounds),
    }


def median_round(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return every answer of the round with the median speed, chunk by chunk.

    Keys: `round` (from 1), `rounds` and `timed` (`Timed.as_dict`, in the prompts' order). Of an
    even number of rounds it is the slower one of the two in the middle.
    """
    by_speed = sorted(range(len(rounds)), key=lambda number: rounds[number].decode_tok_s)
    number = by_speed[(len(rounds) - 1) // 2]
    timed = [timed.as_dict() for timed in rounds[number].timed]
    return {"round": number + 1, "rounds": len(rounds), "timed": timed}


def compare(base: Mapping[str, Any], mtp: Mapping[str, Any]) -> dict[str, Any]:
    """Return both results and how the texts differ.

    Keys: `base` and `mtp` (as `bench decode`), `acceptance`, `decode_tok_s`, `greedy_identical`,
    `divergences`.
    """
    prompts = [TokenPrompt(p["id"], tuple(p["token_ids"])) for p in base["prompts"]]
    reference = [
        ScoredCompletion(tuple(r["token_ids"]), tuple(r["margins"])) for r in base["reference"]
    ]
    texts = [tuple(tokens) for tokens in mtp["texts"]]
    divergences = find_divergences(prompts, reference, texts)
    results = {"base": base["result"], "mtp": mtp["result"]}
    acceptance = results["mtp"]["acceptance"]
    return {
        "acceptance": acceptance and acceptance["median"],
        "decode_tok_s": {name: r["decode_tok_s"]["median"] for name, r in results.items()},
        "greedy_identical": not divergences and all(r["repeatable"] for r in results.values()),
        "divergences": [asdict(divergence) for divergence in divergences],
        **results,
    }
