"""Every benchmark of one server, against vLLM itself. The tiny model's scores mean nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.server import managed_server
from mtp_graft.stages.splice import splice

from .conftest import Run

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("whole_sandbox")]

EVALS = ("gsm8k", "humaneval", "mmlu", "capability")


@pytest.fixture(params=["base", "mxfp4"])
def checkpoint(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    """The bundled base, or the same with upstream's head, which then drafts."""
    if request.param == "base":
        return tiny_model / "base"
    splice(tiny_model / "base", tiny_model / "upstream", tmp_path / "spliced", request.param)
    return tmp_path / "spliced"


def test_every_benchmark_runs_to_its_end(
    run: Run, checkpoint: Path, tiny_model: Path, shared_data: Path, tmp_path: Path
) -> None:
    limited = ("--data-dir", shared_data, "--limit", 3)
    asked = {name: ("--max-tokens", 24, *limited) for name in EVALS[:3]}
    asked |= {"capability": ("--max-tokens", 24), "workload": ("--max-tokens", 32)}
    results: dict[str, dict[str, Any]] = {}
    # The workload's longest prompt is 2,269 tokens with its document, system prompt and tools.
    options = ServeOptions(checkpoint, port=0, max_model_len=4096)
    with managed_server(options, tmp_path / "vllm.log") as client:
        for name, arguments in asked.items():
            status, out, errors = run(
                *("bench", name, "--base-url", client.base_url, *arguments),
                *("--run", tmp_path / "run", "--json", "-"),
            )
            assert status == 0, errors
            results[name] = json.loads(out)
        counters = client.spec_decode_counters()
    assert [results[name]["total"] for name in EVALS] == [3, 3, 3, 14]
    assert all(results[name]["retried"] == {} for name in EVALS)
    units = (tmp_path / "run" / "bench" / "gsm8k" / "units.jsonl").read_text().splitlines()
    answers = [row["value"] for row in map(json.loads, units) if row["unit"].startswith("answer")]
    assert len(answers) == 3 and all(answer["content"].strip() for answer in answers)

    workload = results["workload"]
    assert (workload["requests"], workload["errors"]) == (15, 0)
    assert all(0 < task["completion_tokens"] <= 32 for task in workload["tasks"])
    drafts = checkpoint != tiny_model / "base"
    assert (counters is not None) == (workload["acceptance"] is not None) == drafts
