"""The public benchmarks' questions: from a folder, or from the hub."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from mtp_graft.errors import GraftError

Row = dict[str, Any]
Item = TypeVar("Item")

#: Benchmark -> dataset on the hub, and its Parquet file with the test questions.
HUB = {
    "gsm8k": ("openai/gsm8k", "main/test-00000-of-00001.parquet"),
    "humaneval": ("openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet"),
    "mmlu": ("cais/mmlu", "all/test-00000-of-00001.parquet"),
}


def gsm8k_rows(folder: Path | None) -> list[Row]:
    """Return GSM8K's test questions: `question` and `answer`, which ends with `#### N`."""
    if folder is None:
        return _from_hub("gsm8k")
    return _read(folder / "gsm8k" / "test.jsonl", partial(_json_lines, ("question", "answer")))


def humaneval_rows(folder: Path | None) -> list[Row]:
    """Return HumanEval's problems: `task_id`, `prompt`, `entry_point` and `test`."""
    if folder is None:
        return _from_hub("humaneval")
    keys = ("task_id", "prompt", "entry_point", "test")
    return _read(folder / "human_eval" / "HumanEval.jsonl.gz", partial(_json_lines, keys))


def mmlu_rows(folder: Path | None) -> list[Row]:
    """Return MMLU's test questions: `subject`, `question`, four `choices`, `answer` (0 to 3)."""
    if folder is None:
        return _from_hub("mmlu")
    files = sorted((folder / "mmlu" / "test").glob("*_test.csv"))
    if not files:
        raise GraftError(
            f"{folder / 'mmlu' / 'test'}: no *_test.csv; expected one a subject; give the folder "
            "that holds mmlu/ as --data-dir"
        )
    return [row for file in files for row in _read(file, _mmlu_csv)]


def sample(rows: Sequence[Item], limit: int | None, seed: int, what: str) -> list[Item]:
    """Return `limit` of the rows, drawn by `seed`, in the rows' order; all of them for None."""
    if limit is None:
        return list(rows)
    if limit > len(rows):
        raise GraftError(f"{what} has {len(rows)} questions, --limit asks for {limit}: lower it")
    return [rows[i] for i in sorted(Random(seed).sample(range(len(rows)), limit))]


def _read(path: Path, parse: Callable[[Path], list[Row]]) -> list[Row]:
    """Return a file's rows. Raises GraftError if it is not there or not what its name says."""
    try:
        return parse(path)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise GraftError(
            f"{path}: not readable ({error}); expected the folder of the benchmark data as "
            "--data-dir, or none to load it from the hub"
        ) from error


def _json_lines(keys: tuple[str, ...], path: Path) -> list[Row]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            rows.append(json.loads(line))
            _check_texts(rows[-1], keys, f"{path}:{number}")
    return rows


def _check_texts(row: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(row, dict):
        raise GraftError(f"{where}: expected a JSON object a line")
    for key in keys:
        if key not in row:
            raise GraftError(f"{where}: no {key!r}; expected {keys}")
        if not isinstance(row[key], str):
            raise GraftError(f"{where}: {key!r} is {row[key]!r:.60}, expected a text")


def _mmlu_csv(path: Path) -> list[Row]:
    subject = path.stem.removesuffix("_test")
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != 6 or row[5] not in tuple("ABCD"):
                raise ValueError(f"row {number} has no question, four choices and a letter")
            choices, answer = row[1:5], "ABCD".index(row[5])
            rows.append(
                {"subject": subject, "question": row[0], "choices": choices, "answer": answer}
            )
    return rows


def _from_hub(benchmark: str) -> list[Row]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    dataset, name = HUB[benchmark]
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise GraftError(
            f"{dataset}: its files are Parquet, which needs pyarrow: pip install pyarrow, or give "
            "the data as --data-dir"
        ) from error
    try:
        path = hf_hub_download(dataset, name, repo_type="dataset")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise GraftError(
            f"{dataset}: {name} cannot be fetched ({error}); give the data as --data-dir"
        ) from error
    rows: list[Row] = parquet.read_table(path).to_pylist()
    return rows
