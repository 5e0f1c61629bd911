"""Single-stream greedy decode speed, and whether speculative decoding changed the text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

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


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the token ids that every server gets."""

    id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """Every prompt continued once, one after the other."""

    completions: tuple[Completion, ...]
    counters: SpecDecodeCounters | None  # what this round added; None without MTP

    @property
    def token_ids(self) -> tuple[tuple[int, ...], ...]:
        """Return the continuations, in the prompts' order."""
        return tuple(completion.token_ids for completion in self.completions)

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


def tokenize(client: ServerClient, prompts: Sequence[Prompt | ChatPrompt]) -> list[TokenPrompt]:
    """Return the prompts as the server's token ids."""
    return [TokenPrompt(p.id, tuple(client.encode(p))) for p in prompts]


def measure_decode(
    client: ServerClient,
    prompts: Sequence[TokenPrompt],
    config: DecodeConfig,
    report: Report,
    label: str = "decode",
) -> list[Round]:
    """Continue all prompts `config.rounds` times, one request at a time, after a warm-up.

    Raises GraftError if no prompt is continued by more than one chunk of tokens.
    """
    report(f"{label}: warm-up", 0, 0)
    client.stream(prompts[0].token_ids, config.max_tokens, ignore_eos=config.ignore_eos)
    rounds: list[Round] = []
    total = config.rounds * len(prompts)
    before = client.spec_decode_counters()
    for _ in range(config.rounds):
        completions: list[Completion] = []
        for prompt in prompts:
            report(label, len(rounds) * len(prompts) + len(completions), total)
            completions.append(
                client.stream(prompt.token_ids, config.max_tokens, ignore_eos=config.ignore_eos)
            )
        if not any(completion.num_decoded for completion in completions):
            raise GraftError(
                f"{client.base_url}: every answer is a single chunk, so there is no decode time "
                f"to measure; ask for more than {config.max_tokens} tokens or longer answers"
            )
        after = client.spec_decode_counters()
        counters = None if before is None or after is None else after - before
        rounds.append(Round(tuple(completions), counters))
        before = after
    report(label, total, total)
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
        pairs = zip(reference.token_ids, tokens, strict=False)
        shared = min(len(reference.token_ids), len(tokens))
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), shared)
        known = position < len(reference.margins)
        margin = reference.margins[position] if known else None
        divergences.append(Divergence(prompt.id, position, margin))
    return divergences


def decode_result(rounds: Sequence[Round], config: DecodeConfig) -> dict[str, Any]:
    """Return the JSON result of `bench decode`: each quantity over the rounds."""
    counters = [r.counters for r in rounds if r.counters is not None]
    acceptance = [c.acceptance for c in counters if c.acceptance is not None]
    num_tokens = sum(len(tokens) for tokens in rounds[0].token_ids)
    return {
        "decode_tok_s": _spread([r.decode_tok_s for r in rounds]),
        "ttft_ms": _spread([r.ttft_ms for r in rounds]),
        "tpot_ms": _spread([r.tpot_ms for r in rounds]),
        "acceptance": _spread(acceptance) if acceptance else None,
        "drafts": _sum_counters(counters),
        "repeatable": all(r.token_ids == rounds[0].token_ids for r in rounds),
        "num_prompts": len(rounds[0].completions),
        "tokens_per_round": num_tokens,
        "config": asdict(config),
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": median(values),
        "min": min(values),
        "max": max(values),
        "runs": len(values),
        "values": list(values),
    }


def _sum_counters(counters: Sequence[SpecDecodeCounters]) -> dict[str, Any] | None:
    """Return drafted and accepted tokens of all rounds, and acceptance by draft position."""
    if not counters:
        return None
    num_drafts = sum(c.num_drafts for c in counters)
    per_position = [
        sum(at) for at in zip(*(c.accepted_per_position for c in counters), strict=True)
    ]
    return {
        "drafted": sum(c.num_draft_tokens for c in counters),
        "accepted": sum(c.num_accepted_tokens for c in counters),
        "acceptance_per_position": [n / num_drafts for n in per_position] if num_drafts else None,
    }


def measure_base(
    client: ServerClient,
    prompts: Sequence[Prompt | ChatPrompt],
    config: DecodeConfig,
    report: Report,
) -> dict[str, Any]:
    """Decode `prompts` without a head; return what `measure_mtp` and `compare` need of it.

    Keys: `prompts` ([{id, token_ids}]), `reference` (greedy texts with margins) and `result` (as
    `bench decode`). JSON all of it, so that a killed run need not measure the base again.
    """
    token_prompts = tokenize(client, prompts)
    reference = score_greedy(client, token_prompts, config, report, "base: margins")
    rounds = measure_decode(client, token_prompts, config, report, "base: decode")
    result = decode_result(rounds, config)
    result["repeatable"] &= rounds[0].token_ids == tuple(scored.token_ids for scored in reference)
    return {
        "prompts": [asdict(prompt) for prompt in token_prompts],
        "reference": [asdict(scored) for scored in reference],
        "result": result,
    }


def measure_mtp(
    client: ServerClient, base: Mapping[str, Any], config: DecodeConfig, report: Report
) -> dict[str, Any]:
    """Decode the base's prompts with a head; return `result` and the `texts` (token ids)."""
    prompts = [TokenPrompt(p["id"], tuple(p["token_ids"])) for p in base["prompts"]]
    rounds = measure_decode(client, prompts, config, report, "MTP: decode")
    return {
        "texts": [list(tokens) for tokens in rounds[0].token_ids],
        "result": decode_result(rounds, config),
    }


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
