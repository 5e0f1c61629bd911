"""Every benchmark of one server, against vLLM itself. The tiny model's scores mean nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.server import managed_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EVALS = ("gsm8k", "humaneval", "mmlu", "capability")


@pytest.mark.usefixtures("sandbox")
def test_every_benchmark_runs_to_its_end(
    mtp_graft: Callable[..., Any], spliced: dict[str, Path], shared_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("inspect_ai", reason="Inspect is not installed (extra `evals`)")
    limited = ("--data-dir", shared_data, "--limit", 3)
    asked = {name: ("--max-tokens", 24, *limited) for name in EVALS[:3]}
    asked |= {"capability": ("--max-tokens", 24), "workload": ("--max-tokens", 32)}
    asked |= {"decode": ("--max-tokens", 16, "--limit", 2, "--rounds", 1)}
    results: dict[str, dict[str, Any]] = {}
    # The workload's longest prompt is 2,269 tokens with its document, system prompt and tools.
    options = ServeOptions(spliced["mxfp4"], port=0, max_model_len=4096, num_speculative_tokens=2)
    with managed_server(options, tmp_path / "vllm.log") as client:
        for name, arguments in asked.items():
            words = ("bench", name, "--base-url", client.base_url, *arguments)
            results[name] = mtp_graft(*words, "--run", tmp_path / "run")
    assert [results[name]["total"] for name in EVALS] == [3, 3, 3, 14]

    workload = results["workload"]
    assert workload["requests"] == 15
    assert all(0 < task["completion_tokens"] <= 32 for task in workload["tasks"])
    assert workload["acceptance"] is not None

    decode = results["decode"]
    assert (decode["num_prompts"], decode["tokens_per_round"]) == (2, 32)
    assert decode["decode_tok_s"]["median"] > 0
    first, second = decode["acceptance_by_position"]
    assert decode["k"] == 2 and 0 < first <= 1
    # A step accepts a second draft only where it accepted the first.
    assert decode["acceptance_length"] == pytest.approx(1 + first + first * second)


def test_sweep_holds_an_odd_load_with_and_without_the_head(
    mtp_graft: Callable[..., Any], spliced: dict[str, Path]
) -> None:
    load = "-k 0,2 --concurrency 1,3 --max-model-len 256 --max-tokens 8 --limit 3 --requests 1"
    points = mtp_graft("bench", "sweep", "--checkpoint", spliced["mxfp4"], *load.split())["points"]
    assert [(p["k"], p["concurrency"]) for p in points] == [(0, 1), (0, 3), (2, 1), (2, 3)]
    for point in points:
        assert point["requests"] >= point["concurrency"] and point["errors"] == 0
        assert point["tokens"] >= 8 * point["concurrency"]
        by_position = point["acceptance_by_position"]
        assert by_position is None if point["k"] == 0 else len(by_position) == 2
