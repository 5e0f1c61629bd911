"""Whether one head is accepted more often than another, told by the texts that both have."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from mtp_graft.bench.paired import paired_differences


def counts(hits: Sequence[int], drafts: int = 20) -> list[dict[str, Any]]:
    return [{"id": f"t{n}", "drafts": drafts, "accepted": hit} for n, hit in enumerate(hits)]


def test_a_small_gain_on_every_text_is_seen_where_separate_intervals_overlap() -> None:
    """Texts differ by far more than heads do; on each text gptq has one draft more."""
    rtn = [random.Random(n).randrange(2, 19) for n in range(60)]
    found = paired_differences({"gptq": counts([h + 1 for h in rtn]), "rtn": counts(rtn)})
    assert found == {"gptq-rtn": pytest.approx([0.05, 0.05])}


def test_a_difference_that_comes_and_goes_has_zero_inside() -> None:
    rtn = [10] * 40
    gptq = [10 + random.Random(n).choice((-3, 3)) for n in range(40)]
    low, high = paired_differences({"gptq": counts(gptq), "rtn": counts(rtn)})["gptq-rtn"]
    assert low < 0 < high
    true = sum(gptq) / 800 - 0.5
    assert low < true < high


def test_the_interval_is_that_of_a_slow_resampling() -> None:
    gptq = [random.Random(n).randrange(8, 15) for n in range(30)]
    rtn = [random.Random(n + 99).randrange(7, 14) for n in range(30)]
    draw = random.Random(5)
    differences = sorted(
        sum(gptq[n] - rtn[n] for n in (draw.randrange(30) for _ in range(30))) / 600
        for _ in range(4000)
    )
    expected = [differences[100], differences[3899]]
    [found] = paired_differences({"gptq": counts(gptq), "rtn": counts(rtn)}).values()
    assert found == pytest.approx(expected, abs=0.006)
    assert paired_differences({"gptq": counts(gptq), "rtn": counts(rtn)})["gptq-rtn"] == found


def test_a_text_with_more_drafts_weighs_more() -> None:
    gptq = [{"id": "a", "drafts": 1000, "accepted": 900}, {"id": "b", "drafts": 2, "accepted": 0}]
    rtn = [{"id": "a", "drafts": 1000, "accepted": 800}, {"id": "b", "drafts": 2, "accepted": 2}]
    low, high = paired_differences({"gptq": gptq, "rtn": rtn})["gptq-rtn"]
    assert low == pytest.approx(-1)  # of draws that are b alone
    assert high == pytest.approx(0.1)


def test_heads_without_counts_are_left_out_and_other_texts_are_no_pair() -> None:
    given = {"gptq": counts([3]), "rtn": None, "bf16": counts([3])}
    assert paired_differences(given) == {"gptq-bf16": [0.0, 0.0]}
    with pytest.raises(AssertionError, match="not the same texts"):
        paired_differences({"gptq": counts([3]), "rtn": counts([3, 3])})


def test_a_text_that_ends_before_anything_is_drafted_changes_nothing() -> None:
    given = {"gptq": counts([3]), "rtn": counts([2])}
    at_once = [{"id": "at once", "drafts": 0, "accepted": 0}]
    padded = {head: texts + at_once for head, texts in given.items()}
    assert paired_differences(padded) == paired_differences(given)
