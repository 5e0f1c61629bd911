"""Which drafts pay on this machine: the same loads on one server after another, in turn.

Q: rounds of all candidates, C: loads, P: prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import numpy as np

from mtp_graft.bench.intervals import Array, paired_ratio
from mtp_graft.errors import GraftError


def tune(
    hold: Callable[..., dict[str, Array]], loads: list[int], ks: list[int], choices: dict[str, Any]
) -> dict[str, Any]:
    """Measure, decide and return what `serving.plan.Tuned` reads, but for where it was measured.

    `hold` has a stage and candidates left; `loads` ascend, `ks` begin with 0, the base, `choices`
    with `default`. Any other is taken only if its interval lies above 1. A decision that is none of
    `ks` is then held against the base. Raises GraftError if no prompt was answered by all.
    """
    by_k = hold("k", {f"{k}": {"k": k} for k in ks})
    table: list[dict[str, Any]] = []
    for at, concurrency in enumerate(loads):
        ratios = _ratios(by_k, [at])
        paying = {k: r["estimate"] for k, r in ratios.items() if r["interval"][0] > 1}
        best = max(paying, key=paying.__getitem__, default="0")
        line = {"concurrency": concurrency, "base_tok_s": float(np.median(by_k["0"][at]))}
        table.append({**line, "k": int(best), "tuned": ratios.get(best), "by_k": ratios})
    chosen, taken = [line["k"] for line in table], dict(choices["default"])
    compared: dict[str, Any] = {}
    if len(choices) > 1 and any(chosen):
        k = max(filter(None, chosen), key=chosen.count)
        held = hold(f"k{k}", {name: {"k": k, **taken, **each} for name, each in choices.items()})
        compared = _ratios(held, range(len(loads)))
        for name, ratio in compared.items():
            taken |= choices[name] if ratio["interval"][0] > 1 else {}
    schedule = make_schedule(loads, chosen)
    if len(schedule) > 1 or taken != choices["default"]:
        stage = "-".join(map(str, chain(*schedule, taken.values())))
        tuned = {"k": max(chosen), "schedule": schedule, **taken}
        held = hold(stage, {"base": {"k": 0}, "tuned": tuned})
        for at, line in enumerate(table):
            line["tuned"] = _ratios(held, [at])["tuned"]
    return {"schedule": schedule, **taken, "choices": compared, "table": table}


def hold(
    sweep: Callable[..., Any], num_prompts: int, rounds: int, stage: str, drafts: Mapping[str, Any]
) -> dict[str, Array]:
    """Return each candidate's speeds [C, Q, P], measured in the order A B C, C B A, ...

    `sweep` serves by a name, `k` and more of `ServeOptions`, and returns `measure_sweep`'s points.
    """
    found: dict[str, list[Array]] = {name: [] for name in drafts}
    for turn in range(rounds):
        for name in list(drafts)[:: -1 if turn % 2 else 1]:
            points = sweep(f"{stage}-{name}-round{turn + 1}", **drafts[name])
            found[name].append(np.array([_speeds(p["answers"], num_prompts) for p in points]))
    return {name: np.stack(speeds, axis=1) for name, speeds in found.items()}


def _speeds(answers: Sequence[tuple[int, float]], num_prompts: int) -> Array:
    """Return tokens a second [P] from sending on: a busy server may send an answer all at once."""
    prompt = np.arange(len(answers)) % num_prompts  # which take turns
    tokens, seconds = (np.bincount(prompt, of, num_prompts) for of in np.array(answers).T)
    return np.divide(tokens, seconds, out=np.zeros(num_prompts), where=seconds > 0)


def _ratios(speeds: Mapping[str, Array], loads: Sequence[int]) -> dict[str, Any]:
    """Return every candidate's ratio to the first one; of several loads, the mean's."""
    every = np.stack([candidate[loads] for candidate in speeds.values()])  # [S, C, Q, P]
    every = every[..., (every > 0).all(axis=(0, 1, 2))]
    if not every.size:
        raise GraftError("no prompt was answered by all candidates; give others")
    logs = np.log(every).mean(axis=1)  # [S, Q, P]
    base, *others = np.exp(logs)
    ratios = (paired_ratio(ours, base, logs.mean(axis=2)) for ours in others)
    return dict(zip([*speeds][1:], ratios, strict=True))


def make_schedule(concurrencies: Sequence[int], ks: Sequence[int]) -> list[list[int]]:
    """Return k by requests in a step; between two loads that of the larger, where less pays."""
    pairs = zip(concurrencies, ks, strict=True)
    ends = [[*group][-1] for _, group in groupby(pairs, itemgetter(1))]
    return [[before + 1, *end] for (before, _), end in zip([(0, 0), *ends], ends, strict=False)]
