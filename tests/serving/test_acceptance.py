"""Acceptance, from what a stand-in server whose steps are known says that it drafted."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_graft.bench.decode import measure_acceptance
from mtp_graft.checkpoint.capture import FinishedText
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import COUNT_DRAFTS

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


def test_counts_until_the_texts_end_give_the_rate(fake: Callable[..., None], grafted: Path) -> None:
    """Of a text's steps the first, third, ... accepts its draft: 7 of 13, and 2 of 3."""
    fake(ends=ENDS, diverge_at=7)  # past the end of the shorter text
    steps: list[tuple[str, int, int]] = []
    with serving(grafted, None, *COUNT_DRAFTS) as client:
        result = measure_acceptance(client, TEXTS, LIMIT, 2, lambda *step: steps.append(step))
    assert steps == [("acceptance", done, 2) for done in range(3)]
    assert (result["drafted"], result["accepted"]) == (16, 9)
    assert result["acceptance"] == pytest.approx(9 / 16)
    assert result["acceptance_by_position"] == [pytest.approx(9 / 16)]
    assert (result["k"], result["acceptance_length"]) == (1, pytest.approx(25 / 16))
    assert (result["texts"], result["identical"]) == (2, 1)
    assert result["sequences"] == [
        {"id": "a", "drafts": 13, "accepted": 7, "steps": [(1, 1), (1, 0)] * 6 + [(1, 1)]},
        {"id": "b", "drafts": 3, "accepted": 2, "steps": [(1, 1), (1, 0), (1, 1)]},
    ]


def test_drafts_past_a_texts_end_do_not_count(fake: Callable[..., None], grafted: Path) -> None:
    """With k = 3 the stand-in accepts 3, 0, 3, ... drafts, whatever the text has left.

    Texts of 1, 3 and 6 tokens: no step; one with 2 drafts inside; one with 3, one with 1.
    """
    fake(ends=ENDS)
    texts = [known("at once", (6,)), known("early", (5,)), known("later", (7,))]
    with serving(grafted, 3, *COUNT_DRAFTS) as client:
        result = measure_acceptance(client, texts, LIMIT, 2, quiet)
    assert [(s["drafts"], s["accepted"]) for s in result["sequences"]] == [(0, 0), (1, 1), (2, 1)]
    assert (result["drafted"], result["accepted"]) == (6, 5)
    assert result["acceptance_by_position"] == [pytest.approx(2 / 3), 1, 1]
    assert result["acceptance_length"] == pytest.approx(1 + 5 / 3)
    assert result["identical"] == 3


def test_drafting_nothing_is_an_error(fake: Callable[..., None], base: Path, grafted: Path) -> None:
    fake(ends=ENDS)
    said = r"127\.0\.0\.1:\d+: tells of no drafts; serve a head with k >= 1 and --per-request"
    for checkpoint, texts in ((base, TEXTS), (grafted, [known("at once", (6,))])):
        served = serving(checkpoint, None, *COUNT_DRAFTS)
        with served as client, pytest.raises(GraftError, match=said):
            measure_acceptance(client, texts, LIMIT, 1, quiet)
