"""Questions of our own."""

import gzip
import json
from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with twelve questions of our own for each benchmark.

    GSM8K's question i has the answer 10 * i, HumanEval's times_i returns i times its argument, and
    MMLU's two subjects always have B.
    """
    folder = tmp_path / "data"
    for name in ("gsm8k", "human_eval", "mmlu/test"):
        (folder / name).mkdir(parents=True)
    math = ({"question": f"Ten times {i}?", "answer": f"#### {10 * i}"} for i in range(12))
    code = []
    for i in range(12):
        prompt = f'def times_{i}(x):\n    """Return {i} times x."""\n'
        test = f"def check(candidate):\n    assert candidate(3) == {3 * i}\n"
        names = {"task_id": f"HumanEval/{i}", "entry_point": f"times_{i}"}
        code.append(json.dumps({**names, "prompt": prompt, "test": test}))
    (folder / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, math)))
    packed = gzip.compress("\n".join(code).encode())
    (folder / "human_eval" / "HumanEval.jsonl.gz").write_bytes(packed)
    for subject in ("sums", "products"):
        rows = "".join(f"{subject} {i}?,{i},{2 * i},{3 * i},{4 * i},B\n" for i in range(6))
        (folder / "mmlu" / "test" / f"{subject}_test.csv").write_text(rows)
    return folder
