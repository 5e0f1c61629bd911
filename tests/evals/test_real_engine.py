"""All four benchmarks against vLLM itself, with the tiny model. Its scores mean nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.server import managed_server

from .conftest import Run

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("whole_sandbox")]


def test_every_benchmark_runs_to_its_end(
    run: Run, tiny_model: Path, shared_data: Path, tmp_path: Path
) -> None:
    options = ServeOptions(tiny_model / "base", port=0, max_model_len=2048)
    results: dict[str, dict[str, Any]] = {}
    with managed_server(options, tmp_path / "vllm.log") as client:
        for name in ("gsm8k", "humaneval", "mmlu", "capability"):
            asked = () if name == "capability" else ("--data-dir", shared_data, "--limit", 3)
            status, out, errors = run(
                *("bench", name, "--base-url", client.base_url, *asked),
                *("--max-tokens", 24, "--run", tmp_path / "run", "--json", "-"),
            )
            assert status == 0, errors
            results[name] = json.loads(out)
    assert [result["total"] for result in results.values()] == [3, 3, 3, 14]
    assert all(result["retried"] == {} for result in results.values())
    units = (tmp_path / "run" / "bench" / "gsm8k" / "units.jsonl").read_text().splitlines()
    answers = [row["value"] for row in map(json.loads, units) if row["unit"].startswith("answer")]
    assert len(answers) == 3 and all(answer["content"].strip() for answer in answers)
