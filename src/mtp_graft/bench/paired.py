"""Whether one head's drafts are accepted more often than another's, on the same texts.

Drafts of one text depend on each other, and a text that is hard for one head is hard for the
other. So texts are resampled, not drafts, and both heads are taken on the same ones: the interval
of the difference is narrower than two separate intervals let it seem, and it is honest.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mtp_graft.bench.intervals import bootstrap_interval

#: The differences that are asked for: is calibration worth it, and what does INT4 cost.
PAIRS = (("gptq", "rtn"), ("gptq", "mxfp4"), ("gptq", "bf16"))

#: One text's `id`, `drafts` (first ones of a step) and `accepted`.
TextCount = Mapping[str, Any]


def paired_differences(
    counts: Mapping[str, Iterable[TextCount] | None],
) -> dict[str, list[float]]:
    """Return `a-b` -> 95 % interval of a's acceptance less b's, for the `PAIRS` that there are.

    `counts` has the texts of every head, the same ones in the same order. Texts are drawn with
    replacement, the same for both heads (paired percentile bootstrap, Efron 1979; fixed seed).
    """
    known = {head: list(texts) for head, texts in counts.items() if texts is not None}
    return {
        f"{ours}-{theirs}": list(_interval(known[ours], known[theirs]))
        for ours, theirs in PAIRS
        if ours in known and theirs in known
    }


def _interval(ours: Sequence[TextCount], theirs: Sequence[TextCount]) -> tuple[float, float]:
    assert [text["id"] for text in ours] == [text["id"] for text in theirs], "not the same texts"
    # A text that ends at once has no drafts, and a draw of such texts alone no rate.
    drafted = [both for both in zip(ours, theirs, strict=True) if all(t["drafts"] for t in both)]
    table = np.array(
        [[[t["accepted"], t["drafts"]] for t in both] for both in drafted]
    )  # [T, 2, 2]

    def difference(drawn: np.ndarray[Any, np.dtype[np.int64]]) -> float:
        (a_hits, a_drafts), (b_hits, b_drafts) = table[drawn].sum(axis=0)
        return float(a_hits / a_drafts - b_hits / b_drafts)

    return bootstrap_interval(len(drafted), difference)
