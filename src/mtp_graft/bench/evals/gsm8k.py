"""GSM8K: grade-school word problems, answered step by step, exact match on `#### N`.

The number is found and compared as lm-eval's task `gsm8k` does with its filter `strict-match`.
"""

import re
from functools import partial
from pathlib import Path

from mtp_graft.bench.evals.asking import Answer, Question
from mtp_graft.bench.evals.data import gsm8k_rows, sample
from mtp_graft.bench.evals.evaluation import Evaluation, Item, Judgement, compare
from mtp_graft.errors import GraftError

_INSTRUCTION = (
    "\n\nWork it out step by step. End with a line that has four number signs, a space and the "
    "final number alone, without a unit, for example:\n#### 42"
)
_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def gsm8k(
    data_dir: Path | None, limit: int | None, seed: int, max_tokens: int = 1024
) -> Evaluation:
    """Return `limit` of the test questions, drawn by `seed`."""
    rows = sample(list(enumerate(gsm8k_rows(data_dir))), limit, seed, "GSM8K")
    items = []
    for number, row in rows:
        expected = find_number(row["answer"])
        if expected is None:
            raise GraftError(f"GSM8K question {number}: no '#### N' in the reference answer")
        text = row["question"].strip() + _INSTRUCTION
        question = Question(f"gsm8k/{number}", ({"role": "user", "content": text},), max_tokens)
        items.append(Item(question, partial(judge_number, expected)))
    settings = {"limit": limit, "seed": seed, "max_tokens": max_tokens}
    return Evaluation("gsm8k", tuple(items), settings)


def find_number(text: str) -> str | None:
    """Return the number after the first `#### `, without commas and a final full stop."""
    found = _ANSWER.search(text)
    return found and found[1].replace(",", "").removesuffix(".")


def judge_number(expected: str, answer: Answer) -> Judgement:
    """Compare an answer's number, as text, with the reference's."""
    return compare(find_number(answer.text), expected, answer)
