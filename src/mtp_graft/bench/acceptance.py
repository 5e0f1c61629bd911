"""How often a running server accepts its head's drafts, on texts whose ending is known."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mtp_graft.bench.decode import Report
from mtp_graft.bench.drafting import drafting_result
from mtp_graft.dsv4.acceptance import wilson_interval
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import COUNT_DRAFTS, ServerClient, Step
from mtp_graft.serving.concurrent import concurrently
from mtp_graft.serving.metrics import SpecDecodeCounters


@dataclass(frozen=True)
class KnownText:
    """A prompt and the base's greedy continuation, as it was captured."""

    id: str
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


def measure_acceptance(
    client: ServerClient,
    texts: Sequence[KnownText],
    max_tokens: int,
    concurrency: int,
    report: Report,
    label: str = "acceptance",
) -> dict[str, Any]:
    """Have every text continued again, with drafts, until it ends; return what was accepted.

    The server was started with COUNT_DRAFTS. Keys: `acceptance`, `accepted`, `drafted`, `interval`
    (95 %, Wilson), those of `drafting_result`, `texts`, `identical`, how many continuations equal
    the captured ones, and `sequences`, each text's `id`, `drafts` (first ones of a step) and
    `accepted`. With several requests in a step, sums round in another order, so a few may leave
    the text where the base is unsure. Raises GraftError if the server tells of no drafts.
    """
    steps: list[list[Step]] = [[]] * len(texts)
    identical = 0

    def ask(number: int) -> tuple[int, tuple[int, ...], list[Step]]:
        return number, *client.complete_counted(texts[number].prompt, max_tokens)

    report(label, 0, len(texts))
    asked = concurrently(ask, range(len(texts)), concurrency)
    for done, (number, answer, told) in enumerate(asked, start=1):
        identical += answer == texts[number].continuation
        steps[number] = list(within_text(told, len(answer)))
        report(label, done, len(texts))
    sequences = [
        {
            "id": text.id,
            "drafts": sum(step.drafted > 0 for step in each),
            "accepted": sum(step.accepted > 0 for step in each),
        }
        for text, each in zip(texts, steps, strict=True)
    ]
    counted = count_steps([step for each in steps for step in each])
    drafted, accepted = counted.num_draft_tokens, counted.num_accepted_tokens
    if not drafted:
        raise GraftError(
            f"{client.base_url}: tells of no drafts; serve a head with k >= 1 and "
            f"{' '.join(COUNT_DRAFTS)}"
        )
    return {
        "acceptance": accepted / drafted,
        "accepted": accepted,
        "drafted": drafted,
        "interval": list(wilson_interval(accepted, drafted)),
        **drafting_result(counted),
        "texts": len(texts),
        "identical": identical,
        "sequences": sequences,
    }


def within_text(steps: Sequence[Step], num_tokens: int) -> Iterator[Step]:
    """Yield the steps that made a text of `num_tokens`, without drafts past its end.

    The last step may draft and accept more than the text has; vLLM counts that too.
    """
    left = num_tokens - 1  # the first comes with the prompt
    for step in steps:
        yield Step(min(step.drafted, left), min(step.accepted, left))
        left -= step.accepted + 1


def count_steps(steps: Sequence[Step]) -> SpecDecodeCounters:
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
