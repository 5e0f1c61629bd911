"""The command line in this process, and the public questions with their right answers."""

import csv
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtp_graft import cli
from mtp_graft.bench.evals.sandbox import Sandbox
from mtp_graft.errors import GraftError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line; return exit status, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mtp-graft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        out, errors = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, errors

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return call


@pytest.fixture(scope="session")
def whole_sandbox() -> None:
    """Every layer of the sandbox; many containers do not have them all."""
    try:
        Sandbox().require()
    except GraftError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def gsm8k(shared_data: Path) -> dict[str, str]:
    """GSM8K's test questions and their whole reference answers."""
    rows = map(json.loads, (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines())
    return {row["question"].strip(): row["answer"] for row in rows}


@pytest.fixture(scope="session")
def humaneval(shared_data: Path) -> list[dict[str, Any]]:
    """HumanEval's problems."""
    with gzip.open(shared_data / "human_eval" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session")
def mmlu(shared_data: Path) -> dict[tuple[str, ...], str]:
    """MMLU's test questions with their choices, and the right letters."""
    rows = []
    for file in (shared_data / "mmlu" / "test").glob("*.csv"):
        with file.open(newline="") as lines:
            rows += list(csv.reader(lines))
    return {(row[0].strip(), *row[1:5]): row[5] for row in rows}


@pytest.fixture
def own_gsm8k(tmp_path: Path) -> Path:
    """A data folder with twelve questions of our own; the answer to question i is 10 * i."""
    rows = [
        {"question": f"Ten times {i}?", "answer": f"10 * {i}\n#### {10 * i}"} for i in range(12)
    ]
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text(json_lines(rows))
    return tmp_path / "data"


@pytest.fixture
def own_humaneval(tmp_path: Path) -> Path:
    """A data folder with twelve problems of our own: times_i is to return i times its argument."""
    rows = [
        {
            "task_id": f"HumanEval/{i}",
            "entry_point": f"times_{i}",
            "prompt": f'def times_{i}(x):\n    """Return {i} times x."""\n',
            "test": f"def check(candidate):\n    assert candidate(3) == {3 * i}\n",
        }
        for i in range(12)
    ]
    (tmp_path / "data" / "human_eval").mkdir(parents=True)
    packed = gzip.compress(json_lines(rows).encode())
    (tmp_path / "data" / "human_eval" / "HumanEval.jsonl.gz").write_bytes(packed)
    return tmp_path / "data"


@pytest.fixture
def own_mmlu(tmp_path: Path) -> Path:
    """A data folder with two subjects of six questions each; the answer is B."""
    (tmp_path / "data" / "mmlu" / "test").mkdir(parents=True)
    for subject in ("sums", "products"):
        rows = "".join(f"{subject} {i}?,{i},{2 * i},{3 * i},{4 * i},B\n" for i in range(6))
        (tmp_path / "data" / "mmlu" / "test" / f"{subject}_test.csv").write_text(rows)
    return tmp_path / "data"


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
