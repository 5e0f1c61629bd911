"""GSM8K, HumanEval and MMLU as Inspect tasks: questions, prompts, and how answers are read."""

import csv
import gzip
import io
import re
import string
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from inspect_ai import Task
from inspect_ai.dataset import Sample
from pydantic_core import from_json

from mtp_graft.bench.evals.judging import Judge, compare, judge_code, make_task, said
from mtp_graft.bench.evals.sandbox import find_python
from mtp_graft.errors import GraftError, in_words
from mtp_graft.serving.client import READ_ERRORS

Row = Mapping[str, Any]

#: Benchmark -> its files in --data-dir; its dataset on the hub, and the file there.
SOURCES = {
    "gsm8k": ("gsm8k/test.jsonl", "openai/gsm8k", "main"),
    "humaneval": ("human_eval/HumanEval.jsonl.gz", "openai/openai_humaneval", "openai_humaneval"),
    "mmlu": ("mmlu/test/*_test.csv", "cais/mmlu", "all"),
}
_GSM8K = (
    "\n\nWork it out step by step. End with a line that has four number signs, a space and the "
    "final number alone, without a unit, for example:\n#### 42"
)
_HUMANEVAL = (
    "Complete this Python function. Answer with one fenced code block that holds the whole "
    "function and the imports it needs, and with nothing else.\n\n```python\n{prompt}```"
)
_MMLU = (
    "Reason in one or two short sentences, then end with exactly this sentence, X being the "
    "letter of the right choice: The answer is (X)."
)
#: No other number may follow on the line: `12/5` is not 12.
_NUMBER = re.compile(r"#### (-?[0-9][0-9.,]*)(?!.*[0-9])")
#: A letter in brackets, or one that ends the line: `Boyle's law` and `B cells` are no letters.
_LETTER = re.compile(
    r"(?i:answer(?: is)?)[ :*]+(?:\(([A-D])\)(?!,? (?:and|or)\b)|([A-D])(?=[ .*]*$))", re.MULTILINE
)


def load_task(name: str, data_dir: Path | None, limit: int | None, seed: int) -> Task:
    """Return a benchmark's task: `limit` of its test questions (None: all) as `seed` draws them.

    Raises GraftError for files that are not the benchmark's, and if its code cannot be confined.
    """
    if name == "humaneval":
        find_python()
    pattern, dataset, config = SOURCES[name]
    to_sample, judge = _ASKED[name]
    files = [_fetch(dataset, config)] if data_dir is None else sorted(data_dir.glob(pattern))
    if not files:
        raise GraftError(
            f"{data_dir}: has no {pattern}; expected the folder of the benchmark data as "
            "--data-dir, or none to load it from the hub"
        )
    samples: list[Sample] = []
    for path in files:
        first = len(samples)
        try:
            for row in _read_rows(path):
                samples.append(to_sample(row, len(samples)))
        except (OSError, EOFError, zlib.error, *READ_ERRORS) as error:
            where = f"{path}: row {len(samples) - first + 1}"
            raise GraftError(f"{where}: not of {name} ({in_words(error)})") from error
    return make_task(name, deal(samples, limit, seed), judge)


def deal(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """Return `limit` of the questions (None: all) as `seed` draws them, from categories in turn."""
    if limit is not None and limit > len(samples):
        raise GraftError(f"there are {len(samples)} questions, --limit asks for {limit}: lower it")
    dealt = Counter[str]()

    def turn(sample: Sample) -> int:
        category = (sample.metadata or {}).get("category", "")
        dealt[category] += 1
        return dealt[category]

    return sorted(Random(seed).sample(samples, len(samples)), key=turn)[:limit]


def _fetch(dataset: str, config: str) -> Path:
    file = f"{config}/test-00000-of-00001.parquet"
    try:
        return Path(hf_hub_download(dataset, file, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        cure = "give the data as --data-dir"
        raise GraftError(f"{dataset}: {file} cannot be fetched ({error}); {cure}") from error


def _read_rows(path: Path) -> Iterable[Row]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows: list[Row] = parquet.read_table(path).to_pylist()
        return rows
    if path.suffix == ".csv":
        subject, text = path.stem.removesuffix("_test"), io.StringIO(path.read_text("utf-8"))
        keys = ("subject", "question", "choices", "answer")
        parts = ((subject, q, c, "ABCD".index(letter)) for q, *c, letter in csv.reader(text))
        return (dict(zip(keys, row, strict=True)) for row in parts)
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == ".gz" else content).split(b"\n")
    return (from_json(line) for line in lines if line.strip())


def find_number(text: str) -> str | None:
    """Return the number after the first `#### `, without commas and a final full stop."""
    found = _NUMBER.search(text)
    return found and found[1].replace(",", "").removesuffix(".")


def find_letter(text: str) -> str | None:
    """Return the letter of `answer is (X)` or `Answer: X`, or of a first line with X alone.

    An answer that states two different letters has none.
    """
    found = {bracketed or bare for bracketed, bare in _LETTER.findall(text)}
    first_line = text.partition("\n")[0].strip(string.punctuation + string.whitespace)
    if not found and first_line in tuple("ABCD"):
        return first_line
    return found.pop() if len(found) == 1 else None


def _gsm8k(row: Row, number: int) -> Sample:
    text, target = row["question"].strip() + _GSM8K, find_number(row["answer"])
    if target is None:
        raise ValueError("no '#### N' in the reference answer")
    return Sample(id=f"gsm8k/{number}", input=text, metadata={"target": target})


def _humaneval(row: Row, _number: int) -> Sample:
    data = {key: row[key] + "" for key in ("prompt", "entry_point", "test")}
    return Sample(id=row["task_id"] + "", input=_HUMANEVAL.format(**data), metadata=data)


def _mmlu(row: Row, number: int) -> Sample:
    choices = "\n".join(f"({x}) " + c for x, c in zip("ABCD", row["choices"], strict=True))
    text = f"{row['question'].strip()}\n\n{choices}\n\n{_MMLU}"
    data = {"category": row["subject"] + "", "target": "ABCD"[row["answer"]]}
    return Sample(id=f"mmlu/{row['subject']}/{number}", input=text, metadata=data)


def _expect(find: Callable[[str], str | None]) -> Judge:
    return lambda output, data: compare(find(said(output)), data["target"], output)


#: Benchmark -> how a row becomes a question (KeyError and the like for no such row), and its judge.
_ASKED: Mapping[str, tuple[Callable[[Row, int], Sample], Judge]] = {
    "gsm8k": (_gsm8k, _expect(find_number)),  # step by step, exact match on `#### N`
    "humaneval": (_humaneval, judge_code),  # from a docstring, judged by unit tests
    "mmlu": (_mmlu, _expect(find_letter)),  # four-way, as many of each subject, give or take one
}
