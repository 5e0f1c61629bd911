"""Every benchmark of one server, against vLLM itself. The tiny model's scores mean nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.server import managed_server

pytestmark = [pytest.mark.vllm, pytest.mark.serves, pytest.mark.slow]

EVALS = ("gsm8k", "humaneval", "mmlu", "capability")


@pytest.fixture(scope="module")
def url(spliced: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the bundled base with upstream's head, which drafts two tokens a step."""
    # The workload's longest prompt is 2,269 tokens with its document, system prompt and tools.
    options = ServeOptions(spliced["mxfp4"], port=0, max_model_len=4096, num_speculative_tokens=2)
    with managed_server(options, tmp_path_factory.mktemp("server") / "vllm.log") as client:
        yield client.base_url


@pytest.mark.usefixtures("sandbox")
def test_every_benchmark_runs_to_its_end(
    mtp_graft: Callable[..., Any], url: str, shared_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("inspect_ai", reason="Inspect is not installed (extra `evals`)")
    limited = ("--data-dir", shared_data, "--limit", 3)
    asked = {name: ("--max-tokens", 24, *limited) for name in EVALS[:3]}
    asked |= {"capability": ("--max-tokens", 24), "workload": ("--max-tokens", 32)}
    asked |= {"decode": ("--max-tokens", 16, "--limit", 2, "--rounds", 1)}
    results: dict[str, dict[str, Any]] = {}
    for name, arguments in asked.items():
        words = ("bench", name, "--base-url", url, *arguments)
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


def test_sweep_holds_an_odd_load(mtp_graft: Callable[..., Any], url: str) -> None:
    load = "--concurrency 1,3 --max-tokens 8 --limit 3 --requests 1"
    points = mtp_graft("bench", "sweep", "--base-url", url, *load.split())["points"]
    assert [(p["k"], p["concurrency"]) for p in points] == [(2, 1), (2, 3)]
    for point in points:
        assert point["requests"] >= point["concurrency"] and point["errors"] == 0
        assert point["tokens"] >= 8 * point["concurrency"]
        assert len(point["acceptance_by_position"]) == 2
