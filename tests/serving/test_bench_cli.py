"""`mtp-graft bench` from the command line, on a stand-in vLLM."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mtp_graft import cli
from mtp_graft.bench import sweep
from mtp_graft.bench.requests import UNITS_NAME
from mtp_graft.errors import GraftError
from mtp_graft.pipeline.device import device_name
from mtp_graft.serving import command, server

from .bench_server import serving
from .conftest import command_environment, read_record

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(vllm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `bench` in this process; return exit status, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mtp-graft", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        out, errors = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, errors

    monkeypatch.setattr(server, "POLL_S", 0.02)
    return call


@pytest.fixture
def asked(prompts_file: Path, tmp_path: Path) -> tuple[object, ...]:
    """Short answers, kept in a run folder."""
    return ("--prompts", prompts_file, "--max-tokens", 20, "--run", tmp_path / "run")


def done(result: tuple[int, str, str]) -> dict[str, Any]:
    """Return the JSON of a command that wrote it to standard output."""
    status, out, errors = result
    assert status == 0, errors
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("decode --against b --base-url http://u", "compare a --checkpoint with --against"),
        ("decode --against-url http://v --checkpoint c", "with --against, or a --base-url"),
        ("decode --checkpoint c --against b --against-url http://u", "compare a --checkpoint"),
        ("decode --base-url http://u --against-url http://v --pairs 1", "--pairs"),
        ("decode --base-url http://u --pairs 2", "--pairs needs --against"),
        ("decode --base-url u:x", "expected http://HOST:PORT"),
        ("sweep", "give one of --base-url and --checkpoint"),
        ("sweep --base-url http://u --k 1,2", "--k needs --checkpoint"),
        ("decode --base-url http://u --k 3", "--k needs --checkpoint"),
        ("sweep --checkpoint c --concurrency 1,0", "--concurrency is '1,0'"),
        ("sweep --checkpoint c --k 1,1", "--k is '1,1'"),
        ("workload --base-url http://u --max-model-len 9", "need --checkpoint"),
        ("sweep --base-url http://u --profile 128k", "need --checkpoint"),
        ("decode --base-url http://u --draft-sample-method greedy", "need --checkpoint"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what_is_wrong(
    run: Run, arguments: str, message: str
) -> None:
    status, out, errors = run(*arguments.split())
    assert (status, out) == (2, "")
    assert message in " ".join(errors.replace("│", " ").split())


def test_decode_against_a_base_prints_the_ratio_and_writes_it(
    run: Run, fake: Callable[..., None], base: Path, grafted: Path, asked: Any, tmp_path: Path
) -> None:
    fake(accepts=[2, 0])
    status, out, errors = run(
        *("decode", "--checkpoint", grafted, "--against", base, "--pairs", 2, "--rounds", 1),
        *(*asked, "--k", 3, "--log", tmp_path / "vllm.log", "--json", tmp_path / "decode.json"),
    )
    assert status == 0, errors
    result = json.loads((tmp_path / "decode.json").read_text())
    for key in ("decode_tok_s", "ttft_ms", "tpot_ms", "acceptance"):
        assert {"median", "min", "max", "runs"} <= result[key].keys()
    assert (result["restarted"], result["errors"]) == (True, 0)
    assert (result["k"], result["against"]["k"]) == (3, None)
    assert "decode speed: " in out and "95 % interval" in out
    assert "greedy text: identical on every prompt" in out
    # 20 tokens: 1, 3, 1, ..., 3
    assert "k = 3: accepted by position 55.6, 100.0, 0.0 % (each given the ones before" in out
    assert json.loads((tmp_path / "run" / "bench" / "decode" / "result.json").read_text()) == result
    logs = {f"vllm-{side}-{n}.log" for side in ("base", "mtp") for n in (1, 2)}
    assert logs <= {file.name for file in tmp_path.iterdir()}


def test_how_drafts_are_made_is_told_to_the_server_that_drafts(
    run: Run, base: Path, grafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[command.ServeOptions] = []

    def no_server(options: command.ServeOptions, *_: Any, **__: Any) -> Any:
        served.append(options)
        raise GraftError("not served")

    monkeypatch.setattr(server, "managed_server", no_server)
    drafting = ("--draft-sample-method", "probabilistic", "--draft-lm-head-quantization", "fp8")
    words = ("decode", *drafting, "--k", 2, "--checkpoint", grafted)
    assert run(*words)[0] == run(*words, "--against", base)[0] == 1
    ours, against = served  # the base takes the first turn
    assert (ours.num_speculative_tokens, against.num_speculative_tokens) == (2, 0)
    assert (ours.draft_sample_method, against.draft_sample_method) == ("probabilistic", None)
    assert (ours.draft_lm_head_quantization, against.draft_lm_head_quantization) == ("fp8", None)


def test_a_profile_is_served_as_serve_does_and_kept_apart(
    run: Run, fake: Callable[..., None], tiny_model: Path, asked: Any, tmp_path: Path
) -> None:
    fake(record=str(tmp_path / "record.json"))
    status, _, errors = run(
        *("decode", "--checkpoint", tiny_model / "base", "--profile", "524k", "--rounds", 1),
        *("--max-model-len", 2048, *asked),
    )
    assert status == 0, errors
    argv = read_record(tmp_path / "record.json")["argv"]
    assert argv[argv.index("--max-num-seqs") + 1] == "3"  # the profile's
    assert argv[argv.index("--max-model-len") + 1] == "2048"  # ours
    kept = tmp_path / "run" / "bench" / "decode-524k"
    manifest = json.loads((kept / "manifest.json").read_text())
    assert (manifest["stage"], manifest["status"]) == ("bench decode-524k", "done")
    assert (manifest["config"]["server"]["profile"], manifest["config"]["k"]) == ("524k", 0)
    assert manifest["device"] == device_name()


def test_a_running_server_is_known_by_its_address_and_by_what_it_drafts(
    run: Run, grafted: Path, asked: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "bench" / "decode" / "manifest.json"
    with serving(grafted, tmp_path / "vllm.log", k=2) as client:
        call = ("decode", "--base-url", client.base_url, *asked, "--rounds", 1, "--json", "-")
        result = done(run(*call))
        manifest = json.loads(path.read_text())
        assert (manifest["config"]["k"], result["k"]) == (2, 2)
        assert manifest["device"] == f"server at {client.base_url}"
        assert done(run(*call)) == result
    assert json.loads(path.read_text()) == manifest, "nothing was measured again"


def test_pairs_that_are_added_join_those_of_the_run_folder(
    run: Run, fake: Callable[..., None], base: Path, grafted: Path, asked: Any, tmp_path: Path
) -> None:
    streams = tmp_path / "streams"
    fake(streams=str(streams), fails={"2": "500"})
    words = ("decode", "--checkpoint", grafted, "--against", base, "--rounds", 1, *asked)

    def measure(pairs: int) -> tuple[dict[str, Any], int]:
        before = num_lines(streams)
        result = done(run(*words, "--json", "-", "--pairs", pairs))
        return result, num_lines(streams) - before

    two, requests = measure(2)
    three, more = measure(3)
    per_pair = three["ratio"]["decode_tok_s"]["per_pair"]
    assert (two["pairs"], three["pairs"]) == (2, 3)
    assert per_pair[:2] == two["ratio"]["decode_tok_s"]["per_pair"]
    assert more < requests, "the first two pairs were not asked again"
    assert two["errors"] > 0 and three["errors"] > two["errors"], "failures are kept"
    assert measure(3) == (three, 0)


@pytest.mark.parametrize(
    ("what", "other", "message"),
    [
        ("pipeline.device.device_name", "1x another", "server.device = "),
        ("serving.command.find_vllm", command.vllm_elsewhere(), "server.vllm = "),
    ],
)
def test_another_device_or_vllm_does_not_measure_into_the_same_folder(
    run: Run,
    grafted: Path,
    asked: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    other: Any,
    message: str,
) -> None:
    words = ("decode", "--checkpoint", grafted, "-k", 1, "--rounds", 1, *asked)
    assert run(*words)[0] == 0
    manifest = tmp_path / "run" / "bench" / "decode" / "manifest.json"
    before = manifest.read_bytes()
    monkeypatch.setattr(f"mtp_graft.{what}", lambda: other)
    status, _, errors = run(*words)
    assert status == 1
    assert f"was begun with {message}" in errors and "use another --run" in errors
    assert manifest.read_bytes() == before


def test_sweep_prints_a_row_a_point_and_draws_them(
    run: Run, grafted: Path, asked: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds = {"ttfts": [0.5], "latencies": [2.5], "duration": 3.0}
    tokens = {"output_lens": [20], "total_output_tokens": 20, "output_throughput": 6.7}
    found = {**seconds, **tokens, "errors": [""]}
    monkeypatch.setattr(sweep, "vllm_bench", lambda *_: nullcontext(lambda _load: found))
    words = ("sweep", "--checkpoint", grafted, "-k", "0,1", *asked, "--json", "-")
    points = done(run(*words, "--concurrency", "1,3"))["points"]
    assert [(p["k"], p["concurrency"]) for p in points] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    keys = {"per_stream_tok_s", "aggregate_tok_s", "ttft_ms", "acceptance", "errors"}
    assert all(keys <= point.keys() for point in points)
    status, out, errors = run(*words[:-2], "--concurrency", "2", "--chart", tmp_path / "x.png")
    assert status == 0, errors
    assert len([line for line in out.splitlines() if line.startswith("│")]) == 6
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_workload_prints_a_row_a_category(run: Run, grafted: Path) -> None:
    status, out, errors = run("workload", "--checkpoint", grafted, "--thinking")
    assert status == 0, errors
    rows = [line.split("│")[1:3] for line in out.splitlines() if line.startswith("│")]
    names = {name.strip(): number.strip() for name, number in rows}
    assert names == {
        **dict.fromkeys(("chat", "coding", "retrieval", "writing", "planning"), "3"),
        "all": "15",
    }


def test_a_killed_client_asks_nothing_twice(
    run: Run, fake: Callable[..., None], site: Path, grafted: Path, asked: Any, tmp_path: Path
) -> None:
    streams = tmp_path / "streams"
    file = tmp_path / "run" / "bench" / "decode" / UNITS_NAME
    words = ["decode", "--checkpoint", grafted, *asked, "--rounds", 5, "--json", "-"]
    environment = command_environment(site, streams=str(streams), step_s=0.005)
    environment["PYTHONPATH"] = f"{site}{os.pathsep}{Path(cli.__file__).parents[2]}"
    client = subprocess.Popen(
        [sys.executable, "-c", KILLABLE, "bench", *map(str, words)], env=environment
    )
    deadline = time.monotonic() + 120
    while not (file.exists() and len(json.loads(file.read_text())["units"]) > 4):
        assert client.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    client.kill()
    client.wait()
    kept = json.loads(file.read_text())["units"]
    streams.unlink()
    fake(streams=str(streams))
    result = done(run(*words))
    missing = 1 + 2 * 5 - len(kept)  # the prompts' tokens are a unit, too
    assert num_lines(streams) == 1 + missing, "a warm-up, and what was missing"
    units = json.loads(file.read_text())["units"]
    assert {name: units[name] for name in kept} == kept
    assert result["decode_tok_s"]["runs"] == 5


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


#: The command, seeing the stand-in only: the test's own patch ends with its process.
KILLABLE = """
import os
from importlib.metadata import Distribution, PackageNotFoundError
from mtp_graft import cli
from mtp_graft.serving import command, server

def distribution(name):
    for dist in Distribution.discover(name=name, path=os.environ["PYTHONPATH"].split(os.pathsep)):
        return dist
    raise PackageNotFoundError(name)

command.distribution = distribution
server.POLL_S = 0.02
cli.main()
"""
