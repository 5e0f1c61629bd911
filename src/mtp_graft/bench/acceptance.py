"""How often a running server accepts its head's drafts, on texts whose ending is known."""

from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

from mtp_graft.bench.requests import Report
from mtp_graft.checkpoint.capture import FinishedText
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import COUNT_DRAFTS, ServerClient
from mtp_graft.serving.metrics import Step, count_steps, drafting_result, wilson_interval


def measure_acceptance(
    client: ServerClient,
    texts: Sequence[FinishedText],
    max_tokens: int,
    concurrency: int,
    report: Report,
    label: str = "acceptance",
) -> dict[str, Any]:
    """Have every text continued again, with drafts, until it ends; return what was accepted.

    The server was started with COUNT_DRAFTS. Keys: `acceptance`, `accepted`, `drafted`, `interval`
    (95 %, Wilson), those of `drafting_result`, `texts`, `identical` (continuations equal to the
    captured ones; with several requests in a step sums round in another order) and `sequences`
    (`id`, `drafts`, first ones of a step, and `accepted`). GraftError if nothing is drafted.
    """
    steps: dict[str, list[Step]] = {}
    identical = 0
    report(label, 0, len(texts))
    with ThreadPool(concurrency) as pool:  # whose threads do not keep Ctrl-C waiting
        answers = pool.imap(lambda text: client.complete_counted(text.prompt, max_tokens), texts)
        for text, (answer, told) in zip(texts, answers, strict=True):
            steps[text.id] = list(_drafting_steps(told, len(answer)))
            identical += answer == text.continuation
            report(label, len(steps), len(texts))
    counters = count_steps([step for of_text in steps.values() for step in of_text])
    if not counters.num_drafts:
        raise GraftError(
            f"{client.base_url}: tells of no drafts; serve a head with k >= 1 and "
            f"{' '.join(COUNT_DRAFTS)}"
        )
    return {
        "acceptance": counters.acceptance,
        "accepted": counters.num_accepted_tokens,
        "drafted": counters.num_draft_tokens,
        "interval": [*wilson_interval(counters.num_accepted_tokens, counters.num_draft_tokens)],
        **drafting_result(counters),
        "texts": len(texts),
        "identical": identical,
        "sequences": [
            {"id": name, "drafts": len(found), "accepted": sum(s.accepted > 0 for s in found)}
            for name, found in steps.items()
        ],
    }


def _drafting_steps(steps: Sequence[Step], num_tokens: int) -> Iterator[Step]:
    """Yield the steps with drafts that made a text of `num_tokens`, without drafts past its end.

    The last step may draft and accept more than the text has; vLLM counts that too.
    """
    left = num_tokens - 1  # the first comes with the prompt
    for step in steps:
        if min(step.drafted, left):
            yield Step(min(step.drafted, left), min(step.accepted, left))
        left -= step.accepted + 1
