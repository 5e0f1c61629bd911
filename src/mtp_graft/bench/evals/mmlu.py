"""MMLU: four-way questions of 57 subjects, mixed uniformly, with a little room to reason.

The letter is found as lm-eval's task `mmlu_pro` finds it, or where that finds none, as its task
`mmlu_generative` does; between the two comes a form of chat models that neither of them knows.
"""

import re
import string
from collections import defaultdict
from functools import partial
from pathlib import Path
from random import Random

from mtp_graft.bench.evals.asking import Answer, Question
from mtp_graft.bench.evals.data import Row, mmlu_rows
from mtp_graft.bench.evals.evaluation import Evaluation, Item, Judgement, compare
from mtp_graft.errors import GraftError

LETTERS = "ABCD"
_INSTRUCTION = (
    "Reason in one or two short sentences, then end with exactly this sentence, X being the "
    "letter of the right choice: The answer is (X)."
)
_ANSWER_IS = re.compile(r"answer is \(?([A-J])\)?")
_ANSWER_COLON = re.compile(r"answer:\W*([A-J])\b", re.IGNORECASE)


def mmlu(data_dir: Path | None, limit: int | None, seed: int, max_tokens: int = 128) -> Evaluation:
    """Return `limit` of the test questions: as many of each subject, give or take one."""
    items = []
    for name, row in mixed(mmlu_rows(data_dir), limit, seed):
        choices = "\n".join(f"({x}) {c}" for x, c in zip(LETTERS, row["choices"], strict=True))
        text = f"{row['question'].strip()}\n\n{choices}\n\n{_INSTRUCTION}"
        question = Question(f"mmlu/{name}", ({"role": "user", "content": text},), max_tokens)
        expected = LETTERS[row["answer"]]
        items.append(Item(question, partial(judge_letter, expected), row["subject"]))
    settings = {"limit": limit, "seed": seed, "max_tokens": max_tokens}
    return Evaluation("mmlu", tuple(items), settings)


def mixed(rows: list[Row], limit: int | None, seed: int) -> list[tuple[str, Row]]:
    """Return `limit` rows with a name each, drawn from the subjects in turn.

    Both the order of the subjects and the rows of each are shuffled by `seed`; None takes all.
    """
    if limit is not None and limit > len(rows):
        raise GraftError(f"MMLU has {len(rows)} questions, --limit asks for {limit}: lower it")
    subjects: dict[str, list[tuple[str, Row]]] = defaultdict(list)
    for row in rows:
        of = subjects[row["subject"]]
        of.append((f"{row['subject']}/{len(of)}", row))
    random = Random(seed)
    decks = list(subjects.values())
    random.shuffle(decks)
    for deck in decks:
        random.shuffle(deck)
    longest = max(map(len, decks), default=0)
    dealt = [deck[turn] for turn in range(longest) for deck in decks if turn < len(deck)]
    return sorted(dealt[:limit], key=lambda named: named[0])


def find_letter(text: str) -> str | None:
    """Return the letter of `answer is (X)`, of `Answer: X`, or of a first line with X alone."""
    found = _ANSWER_IS.search(text) or _ANSWER_COLON.search(text)
    if found:
        return found[1].upper()
    alone = text.partition("\n")[0].strip(string.punctuation + string.whitespace).upper()
    return alone if alone in tuple(LETTERS) else None


def judge_letter(expected: str, answer: Answer) -> Judgement:
    """Compare an answer's letter with the right one."""
    return compare(find_letter(answer.text), expected, answer)
