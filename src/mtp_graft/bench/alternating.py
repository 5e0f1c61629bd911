"""Two servers on the same prompts in turn, so that what drifts meets both alike."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from mtp_graft.bench.decode import (
    DecodeConfig,
    Report,
    Round,
    base_result,
    compare,
    decode_result,
    decode_s,
    measure_reference,
    measure_rounds,
    measured_rounds,
    num_decoded,
    tokenize,
    ttft_s,
    unit_names,
)
from mtp_graft.bench.intervals import Array, paired_ratio
from mtp_graft.bench.requests import Answer, Session
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import Prompt, ServerClient

#: Starts a server, or finds one that runs, for one turn, whose name it gets.
Serve = Callable[[str], AbstractContextManager[ServerClient]]


def measure_decode(
    serve: Serve,
    prompts: Sequence[Prompt],
    config: DecodeConfig,
    report: Report,
    session: Session,
    label: str = "decode",
) -> list[Round]:
    """Measure what the session does not have under this label; without need nothing is served."""
    known = {prompt.id: () for prompt in prompts}
    if not all(name in session.units for name in unit_names(known, config, label)):
        with serve(label) as client:
            token_prompts = tokenize(client, prompts, session)
            if label == "base-1" and config.temperature == 0:
                measure_reference(client, token_prompts, config, report, session)
            measure_rounds(client, token_prompts, config, report, label, session)
    return measured_rounds(known, config, label, session)


def measure_alternating(
    serve: Mapping[str, Serve],
    prompts: Sequence[Prompt],
    pairs: int,
    config: DecodeConfig,
    report: Report,
    session: Session,
) -> dict[str, Any]:
    """Measure turns in the order base, MTP, MTP, base, base, ...; return the comparison.

    `serve` has `base` and `mtp`. Keys: those of `decode_result` for `mtp`, `against` (the same for
    `base`), `ratio` (of decode speed and of time to first token), `greedy_identical` and
    `divergences` (both null where texts are sampled), `pairs`, `errors`, `failures`.
    """
    turns: dict[str, list[list[Round]]] = {"base": [], "mtp": []}
    for pair in range(1, pairs + 1):
        for side in ("base", "mtp") if pair % 2 else ("mtp", "base"):
            turns[side].append(
                measure_decode(serve[side], prompts, config, report, session, f"{side}-{pair}")
            )
    base, mtp = ([r for turn in turns[side] for r in turn] for side in ("base", "mtp"))
    sides = {
        "base": base_result(base, config, session),
        "mtp": {"result": decode_result(mtp, config), "texts": [a["token_ids"] for a in mtp[0]]},
    }
    compared = compare(**sides)
    return {
        **compared["mtp"],
        "against": compared["base"],
        "ratio": {
            "decode_tok_s": paired_ratio(*_speeds(turns["mtp"], turns["base"])),
            "ttft_ms": paired_ratio(_ttft(turns["mtp"]), _ttft(turns["base"])),
        },
        "greedy_identical": compared["greedy_identical"],
        "divergences": compared["divergences"],
        "pairs": pairs,
        **session.as_result(),
    }


def _speeds(*sides: Sequence[Sequence[Round]]) -> list[Array]:
    """Return decoded tokens a second of each side, [Q, P], the rounds of a turn pooled.

    Prompts that some server answered in one chunk have no decode speed and are left out.
    """
    tokens = np.array([_sum_rounds(turns, num_decoded) for turns in sides])  # [2, Q, P]
    seconds = np.array([_sum_rounds(turns, decode_s) for turns in sides])
    decoded = (tokens > 0).all(axis=(0, 1))  # [P]
    if not decoded.any():
        raise GraftError(
            "no prompt was continued by several chunks in every turn, so there is no ratio; "
            "ask for more tokens"
        )
    return list(tokens[..., decoded] / seconds[..., decoded])


def _sum_rounds(turns: Sequence[Sequence[Round]], quantity: Callable[[Answer], float]) -> Array:
    return np.array([[[quantity(a) for a in r] for r in turn] for turn in turns]).sum(axis=1)


def _ttft(turns: Sequence[Sequence[Round]]) -> Array:
    """Return the median time to first token over a turn's rounds, [Q, P]."""
    return np.median([[[ttft_s(a) for a in r] for r in turn] for turn in turns], axis=1)
