"""Questions from a folder and from the hub, and what is read from an answer."""

import gzip
import json
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("inspect_ai", reason="Inspect is not installed (extra `evals`)")

import huggingface_hub
from inspect_ai import Task
from inspect_ai.model import ModelOutput

from mtp_graft.bench.evals import tasks
from mtp_graft.bench.evals.run import TASKS
from mtp_graft.bench.evals.tasks import find_code, find_letter, find_number, judge_code
from mtp_graft.errors import GraftError


def make_task(name: str, data: Path | None, limit: int | None = None, seed: int = 0) -> Task:
    return TASKS[name](data, limit, seed)


def test_hub_and_folder_agree(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = {"openai/gsm8k": "gsm8k/test.jsonl", "cais/mmlu": "mmlu/test/*.csv"}

    def download(repo: str, file: str, repo_type: str) -> str:
        assert (file.partition("/")[2], repo_type) == ("test-00000-of-00001.parquet", "dataset")
        rows = [row for path in sorted(data.glob(files[repo])) for row in tasks._read_rows(path)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
        return str(tmp_path / "test.parquet")

    monkeypatch.setattr(tasks, "hf_hub_download", download)
    for name in ("gsm8k", "mmlu"):
        here, there = (make_task(name, where, 7) for where in (data, None))
        assert [s.model_dump() for s in here.dataset] == [s.model_dump() for s in there.dataset]


def test_a_hub_that_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    error = huggingface_hub.errors.LocalEntryNotFoundError("no connection")
    monkeypatch.setattr(tasks, "hf_hub_download", Mock(side_effect=error))
    with pytest.raises(GraftError, match=r"cais/mmlu: .* cannot be fetched .*--data-dir"):
        make_task("mmlu", None)


def test_questions_depend_on_the_seed_and_subjects_take_turns(shared_data: Path) -> None:
    first, again, other = (
        [sample.id for sample in make_task("mmlu", shared_data, 57 * 3 + 20, seed).dataset]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(make_task("gsm8k", shared_data).dataset) == 1319
    subjects = Counter(str(name).split("/")[1] for name in first)
    assert len(subjects) == 57 and Counter(subjects.values()) == {3: 37, 4: 20}


CUT_OFF = gzip.compress(b'{"task_id": "?"}\n' * 99, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("gsm8k", "gsm8k/test.jsonl", b'{"question": "?"}', r"row 1: .*has no 'answer'"),
        ("gsm8k", "gsm8k/test.jsonl", b"[]", "row 1: not of gsm8k"),
        ("gsm8k", "gsm8k/test.jsonl", b'{"question": "?", "answer": "4"}', "no '#### N'"),
        ("mmlu", "mmlu/test/law_test.csv", b"?,a,b,c,d,A\n?,a,b,c,d,E\n", "row 2: not of mmlu"),
        ("mmlu", "mmlu/test/law.csv", b"?,a,b,c,d,A\n", r"has no mmlu/test/\*_test.csv"),
        ("humaneval", "human_eval/HumanEval.jsonl.gz", b"?", "row 1: not of humaneval"),
        ("humaneval", "human_eval/HumanEval.jsonl.gz", CUT_OFF, "row 1: not of humaneval"),
    ],
)
@pytest.mark.usefixtures("sandbox")
def test_bad_file_named(tmp_path: Path, name: str, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(GraftError, match=message):
        make_task(name, tmp_path)


LETTERS = {
    "Clear. The answer is (C).": "C", "The answer is **(C)**.": "C", "**Answer:** D": "D",
    "the answer is Boyle's law, which is (C)": None, "The answer is B cells, so (D)": None,
    "The answer is C. elegans": None, "The answer is (A) and (C).": None,
    "The answer is (A). No: the answer is (B).": None, "A reason is missing.": None, "": None,
    "The answer is (A).\nAgain: the answer is (A).": "A", "(B).\nBecause it is.": "B",
}  # fmt: skip
NUMBERS = {
    "10 * 4\n#### 40": "40", "#### -1,200.": "-1200", "#### 12 apples": "12", "#### 12/5": None,
    "#### 1\nNo:\n#### 40": "1", "#### 5 x 3 = 15\n#### 15": "15", "####40": None, "40": None,
}  # fmt: skip


def test_a_letter_is_one_that_the_answer_states_and_a_number_the_first_behind_signs() -> None:
    assert {text: find_letter(text) for text in LETTERS} == LETTERS
    assert {text: find_number(text) for text in NUMBERS} == NUMBERS


WHOLE = "def f(x):\n    return x\n"
DOCUMENTED = 'def f(x):\n    """Do.\n\n    ```\n    f(1)\n    ```\n    """\n    return x\n'


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (f"Like so:\n\n```py\n{WHOLE}```\nand\n```\nf(1)\n```", WHOLE),
        (f"First:\n```python\nimport os\n```\nthen:\n```python\n{WHOLE}```", WHOLE),
        (f"````markdown\nSo:\n```python\n{WHOLE}```\n````", WHOLE),
        (f"```markdown\n```python\n{WHOLE}```\n```", WHOLE),
        (f"{WHOLE}~~~\nDone.", WHOLE),
        (WHOLE, WHOLE),
        ("    return x\n```\nDone.", "    return x\n"),
        ("```python\ndef g(x):\n    return x\n```", "def g(x):\n    return x\n"),
    ],
)
def test_code_is_found_in_an_answer(content: str, code: str) -> None:
    assert find_code(content, "f") == code


@given(
    st.sampled_from(["```", "~~~", "````", "`````"]),
    st.sampled_from(["", "python", "py", "Python 3", "python title=f.py"]),
    st.sampled_from(["", "Like so:\n\n", "1. So:\n\n   ", "- ", "Use `f`:\n"]),
    st.sampled_from(["", "\n", "\nDone.", "\n\n```\nf(1)\n```\n"]),
    st.sampled_from([WHOLE, DOCUMENTED, f"import os\n\n\n{WHOLE}", f"{WHOLE}\n\nprint(f(1))\n"]),
)
def test_any_fence_gives_code(mark: str, language: str, before: str, after: str, code: str) -> None:
    indent = " " * len(before.rpartition("\n")[2])
    block = f"{mark}{language}\n{code}{mark}".replace("\n", f"\n{indent}")
    assert find_code(before + block + after, "f") == code


PROMPT = 'import math\n\ndef helper(x):\n    return x\n\ndef f(x):\n    """Do."""\n'


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("def f(x):\n    return helper(math.floor(x))", None),
        ("    return x", None),  # the prompt's body
        ("def g(x):\n    return x", "NameError"),
        ("def f(x):\n    return [].add(x)", "AttributeError"),
        ("def f(x):\n    return 1 +", "SyntaxError"),
    ],
)
@pytest.mark.usefixtures("sandbox")
def test_code_runs_with_helpers_and_failures_are_named(code: str, kind: str | None) -> None:
    test = "def check(candidate):\n    assert candidate(3) == 3\n"
    data = {"prompt": PROMPT, "entry_point": "f", "test": test}
    failure = judge_code(ModelOutput.from_content("m", code), data)
    assert (failure and failure.kind) == kind


@pytest.mark.slow
@pytest.mark.usefixtures("sandbox")
def test_every_reference_solution_of_humaneval_passes(shared_data: Path) -> None:
    packed = (shared_data / "human_eval/HumanEval.jsonl.gz").read_bytes()
    problems = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    assert len(problems) == 164
    for problem in problems:
        whole = f"```python\n{problem['prompt']}{problem['canonical_solution']}```"
        assert judge_code(ModelOutput.from_content("m", whole), problem) is None, problem["task_id"]
