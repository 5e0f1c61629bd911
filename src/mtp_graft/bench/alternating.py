"""Two servers on the same prompts in turn, so that what drifts meets both alike."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mtp_graft.bench.decode import (
    DecodeConfig,
    Report,
    Round,
    decode_result,
    find_divergences,
    kept_prompts,
    measure_decode,
    rounds_of,
    tokenize,
    unit_names,
)
from mtp_graft.bench.intervals import Array, paired_ratio
from mtp_graft.bench.ledger import Ledger
from mtp_graft.bench.streams import Retrying
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ScoredCompletion, ServerClient
from mtp_graft.serving.prompts import ChatPrompt, Prompt

#: Starts a server, or finds one that runs, for one session; the name is the session's.
Serve = Callable[[str], AbstractContextManager[ServerClient]]


@dataclass(frozen=True)
class AlternatingConfig:
    """How often the two servers take turns, and what each does in its turn."""

    pairs: int = 6
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        if self.pairs < 2:
            raise GraftError(
                f"pairs is {self.pairs}, expected at least 2: how much another start of the "
                "servers changes their speed cannot be seen from one"
            )


def measure_alternating(
    mtp: Serve,
    base: Serve,
    prompts: Sequence[Prompt | ChatPrompt],
    config: AlternatingConfig,
    report: Report,
    ledger: Ledger,
    retrying: Retrying,
) -> dict[str, Any]:
    """Measure sessions in the order base, MTP, MTP, base, base, ...; return the comparison.

    What the ledger has is not asked again; a server whose session is complete is not started. Pairs
    that an earlier call measured beyond `config.pairs` count too.
    Keys: those of `decode_result` for `mtp`, `against` (the same for `base`), `ratio` (of decode
    speed and of time to first token), `greedy_identical` and `divergences` (both null where texts
    are sampled), `pairs`, `base_first` (in how many of them), `errors`, `failures`.
    """
    serve = {"base": base, "mtp": mtp}
    for pair in range(config.pairs):
        for side in ("base", "mtp") if pair % 2 == 0 else ("mtp", "base"):
            name = f"{side}-{pair + 1}"
            if not _is_complete(ledger, name, config.decode):
                with serve[side](name) as client:
                    if "reference" not in ledger:  # the first session is the base's
                        _ask_reference(client, prompts, config.decode, report, ledger, retrying)
                    known = kept_prompts(ledger)
                    measure_decode(
                        *(client, known, config.decode, report, name),
                        ledger=ledger,
                        retrying=retrying,
                    )
    pairs = config.pairs
    while all(_is_complete(ledger, f"{side}-{pairs + 1}", config.decode) for side in serve):
        pairs += 1
    return _result(ledger, config.decode, pairs) | retrying.as_dict()


def _is_complete(ledger: Ledger, name: str, config: DecodeConfig) -> bool:
    if "reference" not in ledger:
        return False
    return all(unit in ledger for unit in unit_names(kept_prompts(ledger), config, name))


def _ask_reference(
    client: ServerClient,
    prompts: Sequence[Prompt | ChatPrompt],
    config: DecodeConfig,
    report: Report,
    ledger: Ledger,
    retrying: Retrying,
) -> None:
    """Keep the prompts' token ids, and of a greedy base its texts with their margins."""
    if "prompts" not in ledger:
        ledger.add("prompts", [asdict(prompt) for prompt in tokenize(client, prompts, retrying)])
    known = kept_prompts(ledger)
    for done, prompt in enumerate(known if config.is_greedy else ()):
        report("margins", done, len(known))
        unit = f"reference/{prompt.id}"
        if unit not in ledger:
            score = partial(
                client.score, prompt.token_ids, config.max_tokens, ignore_eos=config.ignore_eos
            )
            ledger.add(unit, asdict(retrying.ask(unit, score)))
    ledger.add("reference", len(known))


def _result(ledger: Ledger, config: DecodeConfig, pairs: int) -> dict[str, Any]:
    prompts = kept_prompts(ledger)
    sessions: dict[str, list[list[Round]]] = {}
    for side in ("base", "mtp"):
        names = [f"{side}-{pair + 1}" for pair in range(pairs)]
        units = [unit_names(prompts, config, name) for name in names]
        sessions[side] = [rounds_of(ledger, unit, len(prompts)) for unit in units]
    rounds = {side: [r for session in found for r in session] for side, found in sessions.items()}
    results = {side: decode_result(found, config) for side, found in rounds.items()}
    identical, divergences = None, None
    if config.is_greedy:
        reference = [_scored(ledger[f"reference/{prompt.id}"]) for prompt in prompts]
        divergences = [
            asdict(found)
            for found in find_divergences(prompts, reference, rounds["mtp"][0].token_ids)
        ]
        texts = tuple(scored.token_ids for scored in reference)
        results["base"]["repeatable"] &= rounds["base"][0].token_ids == texts
        identical = all(r["repeatable"] for r in results.values()) and not divergences
    return {
        **results["mtp"],
        "against": results["base"],
        "ratio": _ratios(sessions["mtp"], sessions["base"]),
        "greedy_identical": identical,
        "divergences": divergences,
        "pairs": pairs,
        "base_first": (pairs + 1) // 2,
    }


def _scored(found: Mapping[str, Any]) -> ScoredCompletion:
    return ScoredCompletion(tuple(found["token_ids"]), tuple(found["margins"]))


def _ratios(ours: Sequence[Sequence[Round]], theirs: Sequence[Sequence[Round]]) -> dict[str, Any]:
    """Return MTP over base with intervals: of a speed (more is better) and of a time (less is)."""
    return {
        "decode_tok_s": paired_ratio(*_decoded_by_both(_speeds(ours), _speeds(theirs))),
        "ttft_ms": paired_ratio(_first_token_times(ours), _first_token_times(theirs)),
    }


def _speeds(sessions: Sequence[Sequence[Round]]) -> Array:
    """Return decoded tokens a second, [Q, P], the rounds of a session pooled; 0 if none were."""
    every = [[r.completions for r in session] for session in sessions]
    tokens = np.array([[[c.num_decoded for c in row] for row in rows] for rows in every])
    seconds = np.array([[[c.decode_s for c in row] for row in rows] for rows in every])
    tokens, seconds = tokens.sum(axis=1), seconds.sum(axis=1)  # [Q, R, P] -> [Q, P]
    speeds: Array = np.divide(tokens, seconds, out=np.zeros_like(seconds), where=seconds > 0)
    return speeds


def _decoded_by_both(ours: Array, theirs: Array) -> tuple[Array, Array]:
    """Leave out prompts that some server answered in one chunk: they have no decode speed."""
    decoded = (ours > 0).all(axis=0) & (theirs > 0).all(axis=0)
    if not decoded.any():
        raise GraftError(
            "no prompt was continued by several chunks in every session, so there is no ratio; "
            "ask for more tokens"
        )
    return ours[:, decoded], theirs[:, decoded]


def _first_token_times(sessions: Sequence[Sequence[Round]]) -> Array:
    """Return the median time to first token over a session's rounds, [Q, P]."""
    every = [[[c.ttft_s for c in r.completions] for r in session] for session in sessions]
    return np.median(np.array(every), axis=1)
