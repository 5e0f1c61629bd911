"""Acceptance, from what a stand-in server whose steps are known says that it drafted."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mtp_graft.bench.acceptance import measure_acceptance
from mtp_graft.checkpoint.capture import FinishedText
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import COUNT_DRAFTS, ServerClient

from .bench_server import quiet, serving
from .fake_vllm import EOS

LIMIT = 20  # new tokens asked for
#: Of a prompt's sum: where the stand-in ends the text.
ENDS = {"3": 4, "5": 2, "6": 0, "7": 5}


def known(name: str, prompt: tuple[int, ...]) -> FinishedText:
    """Return a prompt with the stand-in's own answer to it."""
    tokens = tuple((sum(prompt) + 7 * i) % 1000 for i in range(LIMIT))
    end = ENDS.get(str(sum(prompt)))
    said = tokens if end is None else (*tokens[:end], EOS)
    return FinishedText(0, name, "evaluation", prompt, said)


TEXTS = [known("a", (1, 1)), known("b", (3,))]
Serve = Callable[..., ServerClient]


@pytest.fixture
def serve(fake: Callable[..., None]) -> Iterator[Serve]:
    """Return a function that serves a checkpoint until the test ends."""
    with ExitStack() as stack:

        def start(checkpoint: Path, k: int | None = None, **settings: int) -> ServerClient:
            fake(ends=ENDS, **settings)
            return stack.enter_context(serving(checkpoint, k, *COUNT_DRAFTS))

        yield start


def drafts_and_hits(new_tokens: int) -> tuple[int, int]:
    """Walk an answer step by step; its first, third, ... draft is accepted."""
    made, drafts, hits = 1, 0, 0
    while made < new_tokens:
        drafts += 1
        hit = drafts % 2
        hits += hit
        made += 1 + hit
    return drafts, hits


def test_the_servers_counts_until_the_texts_end_give_the_rate(serve: Serve, grafted: Path) -> None:
    result = measure_acceptance(serve(grafted), TEXTS, LIMIT, 1, quiet)
    (a, a_hits), (b, b_hits) = (drafts_and_hits(n) for n in (LIMIT, 5))
    assert (a + b, a_hits + b_hits) == (16, 9)
    assert (result["drafted"], result["accepted"]) == (16, 9)
    assert result["acceptance"] == pytest.approx(9 / 16)
    assert result["acceptance_by_position"] == [pytest.approx(9 / 16)]
    assert (result["k"], result["acceptance_length"]) == (1, pytest.approx(25 / 16))
    assert result["texts"] == result["identical"] == 2
    assert result["sequences"] == [
        {"id": "a", "drafts": a, "accepted": a_hits},
        {"id": "b", "drafts": b, "accepted": b_hits},
    ]


def test_drafts_past_the_end_of_a_text_do_not_count(serve: Serve, grafted: Path) -> None:
    """With k = 3 the stand-in accepts 3, 0, 3, ... drafts, whatever the text has left.

    Texts of 1, 3 and 6 tokens: no step; one with 2 drafts inside; one with 3, one with 1.
    """
    texts = [known("at once", (6,)), known("early", (5,)), known("later", (7,))]
    result = measure_acceptance(serve(grafted, k=3), texts, LIMIT, 2, quiet)
    assert [(s["drafts"], s["accepted"]) for s in result["sequences"]] == [(0, 0), (1, 1), (2, 1)]
    assert (result["drafted"], result["accepted"]) == (6, 5)
    assert result["acceptance_by_position"] == [pytest.approx(2 / 3), 1, 1]
    assert result["acceptance_length"] == pytest.approx(1 + 5 / 3)
    assert result["identical"] == 3


def test_texts_that_come_out_otherwise_are_not_counted_as_identical(
    serve: Serve, grafted: Path
) -> None:
    client = serve(grafted, diverge_at=7)  # past the end of the shorter text
    assert measure_acceptance(client, TEXTS, LIMIT, 1, quiet)["identical"] == 1


def test_several_requests_at_a_time_are_all_counted_and_reported(
    serve: Serve, grafted: Path
) -> None:
    texts = [known(str(n), (n,)) for n in range(9)]
    steps: list[tuple[str, int, int]] = []
    result = measure_acceptance(
        serve(grafted), texts, LIMIT, 4, lambda *step: steps.append(step), "acceptance: rtn"
    )
    assert steps == [("acceptance: rtn", done, 9) for done in range(10)]
    assert result["texts"] == result["identical"] == 9
    assert [text["id"] for text in result["sequences"]] == [text.id for text in texts]


def test_a_server_without_a_head_and_texts_too_short_to_draft_are_errors(
    serve: Serve, base: Path, grafted: Path
) -> None:
    said = r"127\.0\.0\.1:\d+: tells of no drafts; serve a head with k >= 1 and --per-request"
    with pytest.raises(GraftError, match=said):
        measure_acceptance(serve(base), TEXTS, LIMIT, 1, quiet)
    with pytest.raises(GraftError, match=said):
        measure_acceptance(serve(grafted), [known("at once", (6,))], LIMIT, 1, quiet)
