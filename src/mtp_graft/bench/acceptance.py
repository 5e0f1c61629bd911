"""How often a running server accepts its head's drafts, on texts whose ending is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtp_graft.bench.decode import Report
from mtp_graft.bench.drafting import drafting_result
from mtp_graft.dsv4.acceptance import wilson_interval
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.concurrent import concurrently


@dataclass(frozen=True)
class KnownText:
    """A prompt and the base's greedy continuation, as it was captured."""

    id: str
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


def measure_acceptance(
    client: ServerClient,
    texts: Sequence[KnownText],
    concurrency: int,
    report: Report,
    label: str = "acceptance",
) -> dict[str, Any]:
    """Have every text continued again, with drafts; return what the server counted.

    Keys: `acceptance`, `accepted`, `drafted`, `interval` (95 %, Wilson), those of
    `drafting_result`, `texts` and `identical`, how many continuations equal the captured ones.
    With several requests in a step, sums round in another order, so a few may leave the text where
    the base is unsure.
    Raises GraftError if the server does not draft.
    """
    before = client.spec_decode_counters()
    identical = 0

    def is_identical(text: KnownText) -> bool:
        answer = client.complete(text.prompt, len(text.continuation), ignore_eos=True)
        return answer == text.continuation

    report(label, 0, len(texts))
    for done, same in enumerate(concurrently(is_identical, texts, concurrency), start=1):
        identical += same
        report(label, done, len(texts))
    after = client.spec_decode_counters()
    counted = None if before is None or after is None else after - before
    if counted is None or not counted.num_draft_tokens:
        raise GraftError(f"{client.base_url}: the server drafts nothing; serve a head with k >= 1")
    accepted, drafted = counted.num_accepted_tokens, counted.num_draft_tokens
    return {
        "acceptance": accepted / drafted,
        "accepted": accepted,
        "drafted": drafted,
        "interval": list(wilson_interval(accepted, drafted)),
        **drafting_result(counted),
        "texts": len(texts),
        "identical": identical,
    }
