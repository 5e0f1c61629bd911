"""Which drafts pay on this machine: the same loads on one server after another, in turn.

Q: rounds of all candidates, C: loads, P: prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import numpy as np

from mtp_graft.bench.intervals import Array, paired_ratio
from mtp_graft.errors import GraftError

#: Serves by a name, `k` and more of `ServeOptions`; returns `measure_sweep`'s point of each load.
Sweep = Callable[..., Sequence[Mapping[str, Any]]]


def tune(
    sweep: Sweep,
    loads: Sequence[int],
    ks: Sequence[int],
    choices: Mapping[str, Any],
    num_prompts: int,
    rounds: int,
) -> dict[str, Any]:
    """Measure, decide and return what `serving.tuned.Tuned` reads, but for where it was measured.

    `loads` ascend, `ks` begin with 0, the base, and `choices` with `default`. Any other is taken
    only if its interval lies above 1. A decision that is not one of `ks` is then held against the
    base itself. Raises GraftError if no prompt was answered by all candidates.
    """
    hold = partial(_hold, sweep, num_prompts, rounds)
    by_k = hold("by", {f"k{k}": {"k": k} for k in ks})
    table: list[dict[str, Any]] = []
    for concurrency, base, *others in zip(loads, *by_k.values(), strict=True):
        ratios = {f"{k}": _ratio(ours, base) for k, ours in zip(ks[1:], others, strict=True)}
        paying = {k: r["estimate"] for k, r in ratios.items() if r["interval"][0] > 1}
        best = max(paying, key=paying.__getitem__, default="0")
        line = {"concurrency": concurrency, "base_tok_s": float(np.median(base)), "k": int(best)}
        table.append({**line, "tuned": ratios.get(best), "by_k": ratios})
    chosen, taken = [line["k"] for line in table], dict(choices["default"])
    compared: dict[str, Any] = {}
    if len(choices) > 1 and any(chosen):
        k = max(filter(None, chosen), key=chosen.count)
        held = hold(f"k{k}", {name: {"k": k, **taken, **each} for name, each in choices.items()})
        compared = {name: _ratio(held[name], held["default"]) for name in [*choices][1:]}
        for name, ratio in compared.items():
            taken |= choices[name] if ratio["interval"][0] > 1 else {}
    schedule = make_schedule(loads, chosen)
    if len(schedule) > 1 or taken != choices["default"]:
        stage = "-".join(map(str, chain(*schedule, taken.values())))
        tuned = {"k": max(chosen), "schedule": schedule, **taken}
        held = hold(stage, {"base": {"k": 0}, "tuned": tuned})
        for line, *pair in zip(table, held["tuned"], held["base"], strict=True):
            line["tuned"] = _ratio(*pair)
    return {"schedule": schedule, **taken, "choices": compared, "table": table}


def _hold(
    sweep: Sweep, num_prompts: int, rounds: int, stage: str, candidates: Mapping[str, Any]
) -> dict[str, Array]:
    """Return each candidate's speeds [C, Q, P], measured in the order A B C, C B A, ..."""
    found: dict[str, list[Array]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name in list(candidates)[:: -1 if turn % 2 else 1]:
            points = sweep(f"{stage}-{name}-round{turn + 1}", **candidates[name])
            found[name].append(np.array([_speeds(p["decoded"], num_prompts) for p in points]))
    return {name: np.stack(speeds, axis=1) for name, speeds in found.items()}


def _speeds(decoded: Sequence[tuple[int, float]], num_prompts: int) -> Array:
    """Return tokens a second [P] of prompts that took turns; 0 without an answer of two tokens."""
    prompt = np.arange(len(decoded)) % num_prompts
    tokens, seconds = (np.bincount(prompt, of, num_prompts) for of in np.array(decoded).T)
    return np.divide(tokens, seconds, out=np.zeros(num_prompts), where=seconds > 0)


def _ratio(ours: Array, theirs: Array) -> dict[str, Any]:
    """Return the ratio of speeds [Q, P], or of the mean over loads of speeds [C, Q, P]."""
    both = np.stack([ours, theirs]).reshape(2, -1, *ours.shape[-2:])  # [2, C, Q, P]
    both = both[..., (both > 0).all(axis=(0, 1, 2))]
    if not both.size:
        raise GraftError("no prompt has an answer of two tokens by all candidates; give others")
    return paired_ratio(*np.exp(np.log(both).mean(axis=1)))


def make_schedule(concurrencies: Sequence[int], ks: Sequence[int]) -> list[list[int]]:
    """Return k by requests in a step; between two loads that of the larger, where less pays."""
    pairs = zip(concurrencies, ks, strict=True)
    ends = [[*group][-1] for _, group in groupby(pairs, itemgetter(1))]
    return [[before + 1, *end] for (before, _), end in zip([(0, 0), *ends], ends, strict=False)]
