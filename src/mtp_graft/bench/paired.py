"""Whether one head's drafts are accepted more often than another's, on the same texts.

Drafts of one text depend on each other, and a text that is hard for one head is hard for the
other. So texts are resampled, not drafts, and both heads are taken on the same ones: the interval
of the difference is narrower than two separate intervals let it seem, and it is honest.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mtp_graft.bench.acceptance import KnownText, measure_acceptance
from mtp_graft.bench.decode import Report
from mtp_graft.bench.intervals import bootstrap_interval
from mtp_graft.serving.client import ServerClient

#: The differences that are asked for: is calibration worth it, and what does INT4 cost.
PAIRS = (("gptq", "rtn"), ("gptq", "mxfp4"), ("gptq", "bf16"))

#: One text's `id`, `drafts` (first ones of a step) and `accepted`.
TextCount = Mapping[str, Any]


class CountingClient(ServerClient):
    """Keeps how often each prompt's first drafts were accepted, where the server says so."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        super().__init__(base_url, api_key)
        self.counted: dict[tuple[int, ...], tuple[int, int]] = {}  # prompt -> drafts, accepted

    def _post(
        self, path: str, body: dict[str, Any], *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        answer = super()._post(path, body, timeout_s=timeout_s)
        found = (answer.get("metrics") or {}).get("speculative_decoding")
        if found is not None:
            # Of a step's first draft, whatever k is: how many steps, and how many accepted it.
            steps, none_accepted = found["num_spec_steps"], found["acceptance_histogram"][0]
            self.counted[tuple(body["prompt"])] = (steps, steps - none_accepted)
        return answer


def measure_paired(
    client: ServerClient, texts: Sequence[KnownText], concurrency: int, report: Report, label: str
) -> dict[str, Any]:
    """Return what `measure_acceptance` does, and `sequences`: the counts of every text.

    `sequences` is None if the server does not count drafts for each request.
    """
    with CountingClient(client.base_url) as counting:
        served = measure_acceptance(counting, texts, concurrency, report, label)
        counted = [counting.counted.get(text.prompt) for text in texts]
    whole = [counts for counts in counted if counts is not None]
    if len(whole) < len(texts):
        return {**served, "sequences": None}
    sequences = [
        {"id": text.id, "drafts": drafts, "accepted": accepted}
        for text, (drafts, accepted) in zip(texts, whole, strict=True)
    ]
    return {**served, "sequences": sequences}


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
    tables = [
        np.array([[text["accepted"], text["drafts"]] for text in texts]) for texts in (ours, theirs)
    ]  # [T, 2] each

    def difference(drawn: np.ndarray[Any, np.dtype[np.int64]]) -> float:
        (a_hits, a_drafts), (b_hits, b_drafts) = (table[drawn].sum(axis=0) for table in tables)
        return float(a_hits / a_drafts - b_hits / b_drafts)

    return bootstrap_interval(len(ours), difference)
