"""`mtp-graft bench` from the command line, on a stand-in vLLM."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mtp_graft.bench import sweep
from mtp_graft.cli.target import Target
from mtp_graft.serving import command
from mtp_graft.stages.parallel import device_name

from .bench_server import serving
from .conftest import read_record

Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("vllm")


@pytest.fixture
def run(run_command: Run) -> Run:
    return partial(run_command, "bench")


@pytest.fixture
def asked(tmp_path: Path) -> tuple[object, ...]:
    """Short answers to two prompts of different length, kept in a run folder."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "a", "text": "ab"}\n\n{"id": "b", "text": "hello"}\n')
    return ("--prompts", file, "--max-tokens", 20, "--run", tmp_path / "run")


def done(result: tuple[int, str, str]) -> Any:
    """Return the JSON of a command that wrote it to standard output."""
    assert result[0] == 0, result[2]
    return json.loads(result[1])


def test_decode_gives_the_ratio(run: Run, fake: Any, base: Path, grafted: Path, asked: Any) -> None:
    fake(accepts=[2, 0])
    words = ("decode", "--checkpoint", grafted, "--against", base, *asked, "--rounds", 1, "-k", 3)
    status, out, errors = run(*words, "--pairs", 2, "--json", Path("decode.json"))
    assert status == 0, errors
    result = json.loads(Path("decode.json").read_text())
    for key in ("decode_tok_s", "ttft_ms", "tpot_ms", "acceptance"):
        assert {"median", "min", "max", "runs"} <= result[key].keys()
    assert (result["k"], result["against"]["k"]) == (3, None)
    assert "decode speed: " in out and "95 % interval" in out
    assert "greedy text: identical on every prompt" in out
    # 20 tokens: 1, 3, 1, ..., 3
    assert "k = 3: accepted by position 55.6, 100.0, 0.0 % (each given the ones before" in out
    assert json.loads(Path("run/bench/decode/result.json").read_text()) == result
    # Pairs that are added join those of the run folder.
    more = done(run(*words, "--pairs", 3, "--json", "-"))
    per_pair = [found["ratio"]["decode_tok_s"]["per_pair"] for found in (result, more)]
    assert per_pair[1][:2] == per_pair[0] and more["decode_tok_s"]["runs"] == 3


def test_profile_is_used(run: Run, fake: Any, tiny_model: Path, asked: Any, tmp_path: Path) -> None:
    fake(record=str(tmp_path / "record.json"))
    words = ("decode", "--checkpoint", tiny_model / "base", "--profile", "524k", "--rounds", 1)
    status, _, errors = run(*words, "--max-model-len", 2048, *asked, "--", "--seed", 7)
    assert status == 0, errors
    argv = read_record(tmp_path / "record.json")["argv"]
    assert argv[argv.index("--max-num-seqs") + 1] == "3"  # the profile's
    assert argv[argv.index("--max-model-len") + 1] == "2048"  # ours
    kept = tmp_path / "run" / "bench" / "decode-524k"
    manifest = json.loads((kept / "manifest.json").read_text())
    assert (manifest["stage"], manifest["status"]) == ("bench decode-524k", "done")
    served = "mtp-graft serve base --profile 524k --max-model-len 2048 -k 0 -- --seed 7"
    assert manifest["config"]["server"]["serve"] == served
    assert manifest["device"] == device_name()


def test_a_running_server_is_measured(run: Run, grafted: Path, asked: Any, tmp_path: Path) -> None:
    path = tmp_path / "run" / "bench" / "decode" / "manifest.json"
    with serving(grafted, 2) as client:
        call = ("decode", "--base-url", client.base_url, *asked, "--rounds", 1, "--json", "-")
        result = done(run(*call))
        manifest = json.loads(path.read_text())
        assert (manifest["config"]["k"], result["k"]) == (2, 2)
        assert manifest["device"] == f"server at {client.base_url}"
        assert done(run(*call)) == result
    assert json.loads(path.read_text()) == manifest, "nothing was measured again"


def test_one_gpu_only(run: Run, grafted: Path, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("decode", "--checkpoint", grafted, "-k", 1, "--rounds", 1, "--profile", "none", *asked)
    assert run(*words)[0] == 0
    manifest = Path("run/bench/decode/manifest.json")
    before = manifest.read_bytes()
    for what, other, key in (
        ("stages.parallel.device_name", "1x another", "device"),
        ("cli.target.find_vllm", command.vllm_elsewhere(), "vllm"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"mtp_graft.{what}", lambda other=other: other)
            status, _, errors = run(*words)
        assert status == 1 and f"was begun with server.{key} = " in errors
    assert manifest.read_bytes() == before
    assert Target(checkpoint=grafted).profile == "none"  # on a CPU
    monkeypatch.setattr("mtp_graft.cli.target.find_vllm", command.vllm_elsewhere)
    assert Target(checkpoint=grafted).profile == "auto" != Target(base_url="http://u").profile


def test_points_kept(run: Run, grafted: Path, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"output_lens": [20], "ttfts": [0.5], "latencies": [2.5], "duration": 3.0}
    found = {**times, "errors": [""], "total_output_tokens": 20, "output_throughput": 6.7}
    monkeypatch.setattr(sweep, "run_load", client := Mock(return_value=found))
    words = ("sweep", "--checkpoint", grafted, "-k", "0,1", *asked)
    points = done(run(*words, "--concurrency", "1,3", "--json", "-"))["points"]
    assert [(p["k"], p["concurrency"]) for p in points] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    keys = {"per_stream_tok_s", "aggregate_tok_s", "ttft_ms", "acceptance", "errors"}
    assert all(keys <= point.keys() for point in points)
    status, out, errors = run(*words, "--concurrency", "1,2,3")
    assert status == 0, errors
    assert len([line for line in out.splitlines() if line.startswith("│")]) == 6
    assert client.call_count == 6, "points of the first call are not measured again"
