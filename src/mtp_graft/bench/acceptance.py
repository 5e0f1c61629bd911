"""How often a running server accepts its head's drafts, on texts whose ending is known."""

from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

from mtp_graft.bench.requests import Report
from mtp_graft.checkpoint.capture import FinishedText
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import COUNT_DRAFTS, ServerClient, Step
from mtp_graft.serving.metrics import SpecDecodeCounters, drafting_result, wilson_interval


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
    (95 %, Wilson), those of `drafting_result`, `texts`, `identical` (how many continuations equal
    the captured ones; with several requests in a step sums round in another order) and `sequences`
    (`id`, `drafts`, first ones of a step, and `accepted`). Raises GraftError for a server that
    drafts nothing.
    """

    def ask(text: FinishedText) -> tuple[FinishedText, tuple[int, ...], list[Step]]:
        return text, *client.complete_counted(text.prompt, max_tokens)

    report(label, 0, len(texts))
    steps: dict[str, list[Step]] = {}
    identical = 0
    with ThreadPool(concurrency) as pool:  # whose threads do not keep Ctrl-C waiting
        for text, answer, told in pool.imap_unordered(ask, texts):
            identical += answer == text.continuation
            steps[text.id] = list(_steps_within(told, len(answer)))
            report(label, len(steps), len(texts))
    counted = _count([step for text in texts for step in steps[text.id]])
    if not counted.num_draft_tokens:
        raise GraftError(
            f"{client.base_url}: tells of no drafts; serve a head with k >= 1 and "
            f"{' '.join(COUNT_DRAFTS)}"
        )
    return {
        "acceptance": counted.acceptance,
        "accepted": counted.num_accepted_tokens,
        "drafted": counted.num_draft_tokens,
        "interval": [*wilson_interval(counted.num_accepted_tokens, counted.num_draft_tokens)],
        **drafting_result(counted),
        "texts": len(texts),
        "identical": identical,
        "sequences": [_first_drafts(text.id, steps[text.id]) for text in texts],
    }


def _first_drafts(name: str, steps: Sequence[Step]) -> dict[str, Any]:
    drafts = sum(step.drafted > 0 for step in steps)
    return {"id": name, "drafts": drafts, "accepted": sum(step.accepted > 0 for step in steps)}


def _steps_within(steps: Sequence[Step], num_tokens: int) -> Iterator[Step]:
    """Yield the steps that made a text of `num_tokens`, without drafts past its end.

    The last step may draft and accept more than the text has; vLLM counts that too.
    """
    left = num_tokens - 1  # the first comes with the prompt
    for step in steps:
        yield Step(min(step.drafted, left), min(step.accepted, left))
        left -= step.accepted + 1


def _count(steps: Sequence[Step]) -> SpecDecodeCounters:
    """Return counters of steps, the last of a text among them, which may have fewer drafts."""
    drafting = [step for step in steps if step.drafted]
    places = range(max((step.drafted for step in drafting), default=0))
    return SpecDecodeCounters(
        len(drafting),
        sum(step.drafted for step in drafting),
        sum(step.accepted for step in drafting),
        tuple(sum(step.accepted > place for step in drafting) for place in places),
        tuple(sum(step.accepted >= place < step.drafted for step in drafting) for place in places),
    )
