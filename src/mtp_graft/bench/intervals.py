"""How sure a measured ratio or difference is.

S: servers, Q: starts of each (of both: a pair), P: prompts, T: texts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
_RESAMPLES = 2000
#: The heads whose acceptance is compared: is calibration worth it, and what does INT4 cost.
PAIRS = (("gptq", "rtn"), ("gptq", "mxfp4"), ("gptq", "bf16"))

Array = NDArray[np.float64]
#: One text's `id`, `drafts` (first ones of a step) and `accepted`.
TextCount = Mapping[str, Any]


def paired_ratio(ours: Array, theirs: Array, starts: Array | None = None) -> dict[str, Any]:
    """Return the ratio ours / theirs of positive measurements [Q, P], with a 95 % interval.

    The estimate is the geometric mean; pairs and prompts are both samples. `starts`, mean logs
    [S, Q] of more servers that took turns, say better how much one start differs from another.
    """
    from scipy import stats

    logs = np.log(ours) - np.log(theirs)  # [Q, P]
    assert len(logs) > 1, "one pair says nothing about another start of the servers"
    starts = np.log([ours, theirs]).mean(axis=2) if starts is None else starts
    variance, dof = _crossed_variance(logs, starts)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, dof) * math.sqrt(variance)
    middle = float(logs.mean())
    return {
        "estimate": math.exp(middle),
        "interval": [math.exp(middle - half), math.exp(middle + half)],
        "confidence": CONFIDENCE,
        "pairs": logs.shape[0],
        "prompts": logs.shape[1],
        "per_pair": np.exp(logs.mean(axis=1)).tolist(),
    }


def _crossed_variance(logs: Array, starts: Array) -> tuple[float, float]:
    """Return the variance of the mean of `logs` [Q, P], and its degrees of freedom.

    Of the crossed random-effects model: var(pair means) / Q + var(prompt means) / P less the
    residual that both contain, never below the larger of the two; dof after Satterthwaite (1946).
    var(pair means) is twice that of `starts` [S, Q], less what servers and turns share.
    """
    num_pairs, num_prompts = logs.shape
    rest = starts - starts.mean(axis=1, keepdims=True) - starts.mean(axis=0) + starts.mean()
    of_starts = (len(starts) - 1) * (num_pairs - 1)
    of_pairs = 2 * float((rest**2).sum()) / of_starts / num_pairs
    if num_prompts == 1:
        return of_pairs, float(of_starts)
    of_prompts = float(logs.mean(axis=0).var(ddof=1)) / num_prompts
    residual = logs - logs.mean(axis=1, keepdims=True) - logs.mean(axis=0) + logs.mean()
    dofs = (of_starts, num_prompts - 1, (num_pairs - 1) * (num_prompts - 1))
    shared = float((residual**2).sum()) / dofs[2] / logs.size
    variance = max(of_pairs, of_prompts, of_pairs + of_prompts - shared)
    parts = zip((of_pairs, of_prompts, shared), dofs, strict=True)
    spread = sum(part**2 / dof for part, dof in parts)
    return variance, max(1.0, variance**2 / spread) if spread else 1.0  # nothing varies


def paired_differences(counts: Mapping[str, Iterable[TextCount] | None]) -> dict[str, list[float]]:
    """Return `a-b` -> 95 % interval of a's acceptance less b's, for the `PAIRS` that there are.

    `counts` has the texts of every head, the same ones in the same order. Drafts of one text depend
    on each other: texts are resampled (paired percentile bootstrap, Efron 1979; fixed seed).
    """
    known = {head: list(texts) for head, texts in counts.items() if texts is not None}
    return {
        f"{ours}-{theirs}": _difference(known[ours], known[theirs])
        for ours, theirs in PAIRS
        if ours in known and theirs in known
    }


def _difference(ours: Sequence[TextCount], theirs: Sequence[TextCount]) -> list[float]:
    assert [text["id"] for text in ours] == [text["id"] for text in theirs], "not the same texts"
    # A text that ends at once has no drafts, and a draw of such texts alone has no rate.
    both = [pair for pair in zip(ours, theirs, strict=True) if all(t["drafts"] for t in pair)]
    accepted = np.array([[text["accepted"] for text in pair] for pair in both])  # [T, 2]
    drafts = np.array([[text["drafts"] for text in pair] for pair in both])  # [T, 2]
    drawn = np.random.default_rng(0).integers(len(both), size=(_RESAMPLES, len(both)))
    rates = accepted[drawn].sum(axis=1) / drafts[drawn].sum(axis=1)  # [_RESAMPLES, 2]
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    return [float(bound) for bound in np.quantile(rates[:, 0] - rates[:, 1], ends)]
