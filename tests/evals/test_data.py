"""Questions from a folder and from the hub, and how code is found in an answer."""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from mtp_graft.bench.evals import data
from mtp_graft.bench.evals.gsm8k import gsm8k
from mtp_graft.bench.evals.humaneval import find_code, join
from mtp_graft.bench.evals.mmlu import mixed, mmlu
from mtp_graft.errors import GraftError

ROWS = [
    {"subject": subject, "question": f"{subject} {i}?", "choices": list("wxyz"), "answer": i % 4}
    for subject, size in (("law", 9), ("logic", 3), ("art", 5))
    for i in range(size)
]


def test_the_hubs_files_give_the_same_questions_as_the_folder(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    local = {
        "openai/gsm8k": data.gsm8k_rows(shared_data),
        "openai/openai_humaneval": data.humaneval_rows(shared_data),
        "cais/mmlu": data.mmlu_rows(shared_data),
    }
    fetched = []

    def download(repo: str, file: str, repo_type: str) -> str:
        fetched.append((repo, file, repo_type))
        path = tmp_path / repo.replace("/", "-")
        parquet.write_table(pyarrow.Table.from_pylist(local[repo]), path)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert data.gsm8k_rows(None) == local["openai/gsm8k"]
    assert data.humaneval_rows(None) == local["openai/openai_humaneval"]
    assert gsm8k(None, 50, 3).claim() == gsm8k(shared_data, 50, 3).claim()
    assert mmlu(None, 50, 3).claim() == mmlu(shared_data, 50, 3).claim()
    assert {kind for _, _, kind in fetched} == {"dataset"}


def test_without_pyarrow_the_hub_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(GraftError, match=r"openai/gsm8k: .* needs pyarrow"):
        data.gsm8k_rows(None)


def test_a_hub_that_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")

    def download(*_arguments: Any, **_options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(GraftError, match=r"cais/mmlu: .* cannot be fetched .*--data-dir"):
        data.mmlu_rows(None)


def test_a_sample_depends_on_its_seed_alone() -> None:
    rows = list(range(1000))
    assert data.sample(rows, 50, 1, "x") == data.sample(rows, 50, 1, "x")
    assert data.sample(rows, 50, 1, "x") != data.sample(rows, 50, 2, "x")
    assert data.sample(rows, None, 1, "x") == data.sample(rows, 1000, 1, "x") == rows


def test_subjects_are_dealt_in_turn() -> None:
    for limit, sizes in ((3, [1, 1, 1]), (9, [3, 3, 3]), (13, [3, 5, 5]), (17, [3, 5, 9])):
        found = [row["subject"] for _, row in mixed(ROWS, limit, 0)]
        assert sorted(map(found.count, ("law", "logic", "art"))) == sizes
    names = [name for name, _ in mixed(ROWS, None, 0)]
    assert len(set(names)) == len(ROWS)
    assert mixed(ROWS, 5, 0) == mixed(ROWS, 5, 0) != mixed(ROWS, 5, 1)
    with pytest.raises(GraftError, match="MMLU has 17 questions, --limit asks for 18"):
        mixed(ROWS, 18, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gsm8k/test.jsonl", '{"question": "?"}\n', "test.jsonl:1: no 'answer'"),
        ("gsm8k/test.jsonl", "[]\n", "expected a JSON object a line"),
        ("gsm8k/test.jsonl", "{\n", "not readable"),
        ("gsm8k/test.jsonl", '{"question": "?", "answer": "4"}\n', "question 0: no '#### N'"),
        (
            "gsm8k/test.jsonl",
            '{"question": "?", "answer": "#### 4"}\n\n{"question": "?", "answer": 4}\n',
            "test.jsonl:3: 'answer' is 4, expected a text",
        ),
        ("gsm8k/test.jsonl", '{"question": null, "answer": "#### 4"}', ":1: 'question' is None"),
    ],
)
def test_a_file_that_is_something_else_is_an_error(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(GraftError, match=message):
        gsm8k(tmp_path, None, 0)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b[:10] + b"\xff" * 30, lambda b: b"?"]
)
def test_a_damaged_archive_is_an_error(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "human_eval" / "HumanEval.jsonl.gz"
    file.parent.mkdir()
    file.write_bytes(damage(gzip.compress(b'{"task_id": "?"}\n' * 99)))
    with pytest.raises(GraftError, match=r"HumanEval.jsonl.gz: not readable"):
        data.humaneval_rows(tmp_path)


def test_an_mmlu_row_without_a_letter_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "mmlu" / "test"
    folder.mkdir(parents=True)
    (folder / "law_test.csv").write_text("Is it?,a,b,c,d,A\nIs it?,a,b,c,d,E\n")
    with pytest.raises(GraftError, match="row 2 has no question, four choices and a letter"):
        data.mmlu_rows(tmp_path)


WHOLE = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (f"```python\n{WHOLE}```", WHOLE),
        (f"Like so:\n\n```py\n{WHOLE}```\nand\n```\nf(1)\n```", WHOLE),
        (f"First:\n```python\nimport os\n```\nthen:\n```python\n{WHOLE}```", WHOLE),
        (f"```python\n{WHOLE}", WHOLE),
        (WHOLE, WHOLE),
        ("    return x\n```\nDone.", "    return x\n"),
        ("```python\ndef g(x):\n    return x\n```", "def g(x):\n    return x\n"),
        ("", ""),
    ],
)
def test_code_is_found_in_an_answer(content: str, code: str) -> None:
    assert find_code(content, "f") == code


def test_a_program_has_the_prompts_imports_and_helpers_and_not_its_unfinished_function() -> None:
    prompt = 'import math\n\ndef helper(x):\n    return x\n\ndef f(x):\n    """Do."""\n'
    program = join(prompt, WHOLE, "f")
    assert "import math" in program and "def helper" in program
    assert program.count("def f(") == 1
    assert join(prompt, "    return x\n", "f") == prompt + "    return x\n"
    assert "def f(" not in join(prompt, "def g(x):\n    return x\n", "f")
