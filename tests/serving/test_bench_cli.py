"""`mtp-graft bench` from the command line, on a stand-in vLLM."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import run_folder
from killing import TIMES, kill_in_the_middle, units_in, without
from mtp_graft import cli
from mtp_graft.bench.ledger import LEDGER_NAME
from mtp_graft.errors import GraftError
from mtp_graft.pipeline.device import device_name
from mtp_graft.serving import command, server

from .conftest import BASE_TENSORS, HEAD_TENSORS, command_environment, read_record

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(vllm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; return exit status, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mtp-graft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        out, errors = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, errors

    monkeypatch.setattr(server, "POLL_S", 0.02)
    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("decode", "--against", "b", "--base-url", "http://u"),
            "compare a --checkpoint with --against",
        ),
        (
            ("decode", "--against-url", "http://v", "--checkpoint", "c"),
            "with --against, or a --base-url",
        ),
        (
            ("decode", "--base-url", "http://u", "--against-url", "http://v", "--pairs", "1"),
            "--pairs",
        ),
        (("decode", "--base-url", "http://u", "--pairs", "2"), "--pairs needs --against"),
        (("sweep",), "give one of --base-url and --checkpoint"),
        (("sweep", "--base-url", "http://u", "--k", "1,2"), "--k needs --checkpoint"),
        (("decode", "--base-url", "http://u", "--k", "3"), "--k needs --checkpoint"),
        (("sweep", "--checkpoint", "c", "--streams", "1,0"), "--streams is '1,0'"),
        (("sweep", "--checkpoint", "c", "--k", "1,1"), "--k is '1,1'"),
        (("workload", "--base-url", "http://u", "--max-model-len", "9"), "need --checkpoint"),
        (("sweep", "--base-url", "http://u", "--profile", "128k"), "need --checkpoint"),
        (("mmlu", "--base-url", "http://u", "--tp", "2"), "need --checkpoint"),
        (("decode", "--base-url", "http://u", "--draft-sample-method", "greedy"), "need --check"),
        (
            ("decode", "--checkpoint", "c", "--against", "b", "--against-url", "http://u"),
            "compare a --checkpoint with --against",
        ),
    ],
)
def test_wrong_usage_is_status_2_and_says_what_is_wrong(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    status, out, errors = run("bench", *arguments)
    assert (status, out) == (2, "")
    assert message in " ".join(errors.replace("│", " ").split())


def test_decode_against_a_base_prints_the_ratio_and_writes_it(
    run: Run, base: Path, grafted: Path, prompts_file: Path, tmp_path: Path
) -> None:
    status, out, errors = run(
        *("bench", "decode", "--checkpoint", grafted, "--against", base, "--pairs", 2),
        *("--prompts", prompts_file, "--rounds", 1, "--max-tokens", 20, "--run", tmp_path / "run"),
        *("--log", tmp_path / "vllm.log", "--json", tmp_path / "decode.json"),
    )
    assert status == 0, errors
    result = json.loads((tmp_path / "decode.json").read_text())
    for key in ("decode_tok_s", "ttft_ms", "tpot_ms", "acceptance"):
        assert {"median", "min", "max", "runs"} <= result[key].keys()
    assert result["restarted"] is True
    assert result["errors"] == 0
    assert "decode speed: " in out and "95 % interval" in out
    assert "greedy text: identical on every prompt" in out
    assert json.loads((tmp_path / "run" / "bench" / "decode" / "result.json").read_text()) == result
    assert {f"vllm-{side}-{n}.log" for side in ("base", "mtp") for n in (1, 2)} <= {
        file.name for file in tmp_path.iterdir()
    }


def test_how_drafts_are_made_is_told_to_the_server_that_drafts(
    run: Run, base: Path, grafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[command.ServeOptions] = []

    def no_server(options: command.ServeOptions, *_: Any, **__: Any) -> Any:
        served.append(options)
        raise GraftError("not served")

    monkeypatch.setattr(server, "managed_server", no_server)
    drafting = ("--draft-sample-method", "probabilistic", "--draft-lm-head-quantization", "fp8")
    words = ("bench", "decode", *drafting, "--k", 2, "--checkpoint", grafted)
    assert run(*words)[0] == run(*words, "--against", base)[0] == 1
    ours, against = served  # the base takes the first turn
    assert (ours.num_speculative_tokens, against.num_speculative_tokens) == (2, 0)
    assert (ours.draft_sample_method, against.draft_sample_method) == ("probabilistic", None)
    assert (ours.draft_lm_head_quantization, against.draft_lm_head_quantization) == ("fp8", None)


def test_several_drafts_a_step_and_sampling_are_in_the_result(
    run: Run,
    fake: Callable[..., None],
    base: Path,
    grafted: Path,
    prompts_file: Path,
    tmp_path: Path,
) -> None:
    fake(accepts=[2, 0])
    status, out, errors = run(
        *("bench", "decode", "--checkpoint", grafted, "--against", base, "--pairs", 2, "--k", 3),
        *("--prompts", prompts_file, "--rounds", 1, "--max-tokens", 20, "--temperature", 1),
        *("--json", tmp_path / "decode.json"),
    )
    assert status == 0, errors
    result = json.loads((tmp_path / "decode.json").read_text())
    assert (result["k"], result["against"]["k"]) == (3, None)
    assert result["acceptance_by_position"] == [5 / 9, 1.0, 0.0]  # 20 tokens: 1, 3, 1, ..., 3
    assert result["greedy_identical"] is None
    assert (
        "k = 3: accepted by position 55.6, 100.0, 0.0 % (each given the ones before, after" in out
    )
    assert "greedy text: not compared, since texts are sampled" in out


def test_a_profile_is_served_as_serve_does_and_kept_apart(
    run: Run, fake: Callable[..., None], tiny_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    fake(record=str(tmp_path / "record.json"))
    status, _, errors = run(
        *("bench", "sweep", "--checkpoint", tiny_model / "base", "--profile", "524k"),
        *("--max-model-len", 2048, "--streams", "1", "--requests", 1, "--max-tokens", 6),
        *("--prompts", prompts_file, "--run", tmp_path / "run"),
    )
    assert status == 0, errors
    argv = read_record(tmp_path / "record.json")["argv"]
    assert argv[argv.index("--max-num-seqs") + 1] == "3"  # the profile's
    assert argv[argv.index("--max-model-len") + 1] == "2048"  # ours
    assert "plan: profile 524k" in errors
    kept = tmp_path / "run" / "bench" / "sweep-524k"
    manifest = json.loads((kept / "manifest.json").read_text())
    assert (manifest["stage"], manifest["status"]) == ("bench sweep-524k", "done")
    assert manifest["config"]["server"]["profile"] == "524k"
    assert manifest["device"] == device_name()
    assert (kept / "result.json").exists()


def test_a_running_servers_device_is_not_taken_for_this_machines(
    run: Run, base: Path, prompts_file: Path, tmp_path: Path
) -> None:
    options = command.ServeOptions(base, port=0)
    path = tmp_path / "run" / "bench" / "decode" / "manifest.json"
    with server.managed_server(options, tmp_path / "vllm.log") as client:
        call = (
            *("bench", "decode", "--base-url", client.base_url, "--prompts", prompts_file),
            *("--rounds", 1, "--max-tokens", 6, "--run", tmp_path / "run"),
        )
        status, _, errors = run(*call)
        assert status == 0, errors
        manifest = json.loads(path.read_text())
        assert manifest["device"] == f"server at {client.base_url}"
        assert run(*call)[0] == 0
    assert json.loads(path.read_text()) == manifest, "nothing was measured again"


@pytest.fixture
def sweep_words(grafted: Path, prompts_file: Path, tmp_path: Path) -> tuple[object, ...]:
    """A small sweep into a run folder, but for its loads."""
    asked = ("--prompts", prompts_file, "--requests", 1, "--max-tokens", 6)
    return ("bench", "sweep", "--checkpoint", grafted, "--run", tmp_path / "run", *asked)


def test_loads_that_are_added_join_those_of_the_run_folder(
    run: Run, sweep_words: tuple[object, ...], tmp_path: Path
) -> None:
    kept = tmp_path / "run" / "bench" / "sweep"

    def after(streams: str) -> tuple[list[int], dict[str, Any]]:
        status, out, errors = run(*sweep_words, "--streams", streams, "--json", "-")
        assert status == 0, errors
        result = json.loads((kept / "result.json").read_text())
        assert json.loads(out) == result
        manifest = json.loads((kept / "manifest.json").read_text())
        return [point["concurrency"] for point in result["points"]], manifest

    numbers, first = after("1,3")
    assert numbers == [1, 3]
    numbers, second = after("2")
    assert numbers == [1, 2, 3] and second["seconds"] != first["seconds"]
    assert after("3") == ([1, 2, 3], second), "nothing was measured"


def test_pairs_that_are_added_join_those_of_the_run_folder(
    run: Run,
    fake: Callable[..., None],
    base: Path,
    grafted: Path,
    prompts_file: Path,
    tmp_path: Path,
) -> None:
    fake(streams=str(tmp_path / "streams"))
    words = (
        *("bench", "decode", "--checkpoint", grafted, "--against", base, "--rounds", 1),
        *("--prompts", prompts_file, "--max-tokens", 6, "--run", tmp_path / "run", "--json", "-"),
    )

    def asked(pairs: int) -> tuple[dict[str, Any], str, int]:
        before = num_lines(tmp_path / "streams")
        status, out, errors = run(*words, "--pairs", pairs)
        assert status == 0, errors
        return json.loads(out), errors, num_lines(tmp_path / "streams") - before

    def speeds(result: dict[str, Any]) -> list[float]:
        found: list[float] = result["ratio"]["decode_tok_s"]["per_pair"]
        return found

    two, said, requests = asked(2)
    assert two["pairs"] == 2 and "came first" not in said
    three, said, more = asked(3)
    assert three["pairs"] == 3 and "the base came first in 2 of 3 pairs" in said
    assert speeds(three)[:2] == speeds(two)
    assert 2 * more == requests, "the first two pairs were not asked again"
    again, _, more = asked(2)
    assert (again, more) == (three, 0), "fewer pairs are a look at all that there are"


@pytest.mark.parametrize(
    ("what", "other", "message"),
    [
        ("pipeline.device.device_name", "1x another", "server.device = "),
        ("serving.command.find_vllm", command.vllm_elsewhere(), "server.vllm = "),
    ],
)
def test_another_device_or_vllm_does_not_measure_into_the_same_folder(
    run: Run,
    sweep_words: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    other: Any,
    message: str,
) -> None:
    assert run(*sweep_words, "--streams", "1")[0] == 0
    manifest = tmp_path / "run" / "bench" / "sweep" / "manifest.json"
    before = manifest.read_bytes()
    monkeypatch.setattr(f"mtp_graft.{what}", lambda: other)
    status, _, errors = run(*sweep_words, "--streams", "1,2")
    assert status == 1
    assert f"was begun with {message}" in errors and "use another --run" in errors
    assert manifest.read_bytes() == before


def test_a_repeated_decode_keeps_the_failures_of_the_one_that_measured(
    run: Run, fake: Callable[..., None], grafted: Path, prompts_file: Path, tmp_path: Path
) -> None:
    fake(fails={"2": "500"})
    words = (
        *("bench", "decode", "--checkpoint", grafted, "--prompts", prompts_file, "--rounds", 1),
        *("--max-tokens", 6, "--run", tmp_path / "run", "--json", "-"),
    )
    first, again = run(*words), run(*words)
    assert first[0] == again[0] == 0, first[2] + again[2]
    assert json.loads(first[1])["errors"] == 1
    assert again[1] == first[1]


def test_sweep_prints_a_row_a_point_and_draws_them(
    run: Run, grafted: Path, prompts_file: Path, tmp_path: Path
) -> None:
    status, out, errors = run(
        *("bench", "sweep", "--checkpoint", grafted, "-k", "0,1", "--streams", "1,3"),
        *("--prompts", prompts_file, "--requests", 2, "--max-tokens", 6),
        *("--chart", tmp_path / "sweep.png", "--json", "-"),
    )
    assert status == 0, errors
    points = json.loads(out)["points"]
    assert [(p["k"], p["concurrency"]) for p in points] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    keys = {"per_stream_tok_s", "aggregate_tok_s", "ttft_ms", "acceptance", "errors"}
    assert all(keys <= point.keys() for point in points)
    assert "streams 3: k = " in errors
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_workload_prints_a_row_a_category(run: Run, grafted: Path) -> None:
    status, out, errors = run("bench", "workload", "--checkpoint", grafted, "--thinking")
    assert status == 0, errors
    rows = [line.split("│")[1:3] for line in out.splitlines() if line.startswith("│")]
    names = {name.strip(): number.strip() for name, number in rows}
    assert names == {
        **dict.fromkeys(("chat", "coding", "retrieval", "writing", "planning"), "3"),
        "all": "15",
    }


def test_card_is_made_of_what_the_commands_leave(
    run: Run, base: Path, prompts_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    checkpoint = run_folder.stages(folder)
    tensors = dict.fromkeys((*BASE_TENSORS, *HEAD_TENSORS), run_folder.HEAD)
    run_folder.write(checkpoint / "model.safetensors.index.json", {"weight_map": tensors})
    served = ("--checkpoint", checkpoint, "--run", folder)
    prompts = ("--prompts", prompts_file, "--max-tokens", 6)
    for command_line in (
        ("decode", *served, *prompts, "--against", base, "--pairs", 2, "--rounds", 1, "-k", 1),
        ("sweep", *served, *prompts, "--k", "0,1", "--streams", "1,2", "--requests", 1),
        ("workload", *served, "--max-model-len", 4096),
    ):
        status, _, errors = run("bench", *command_line)
        assert status == 0, errors
    status, out, errors = run("card", folder, "--json", "-")
    assert status == 0, errors
    result = json.loads(out)
    assert result["left_out"] == []
    assert not any("bench decode" in what or "sweep" in what for what in result["not_measured"])
    page = Path(result["card"]).read_text()
    assert page.count(f"**Device: {device_name()}.** ") == 4  # decode, profile, scaling, workload
    assert "| no profile | with MTP | " in page and "2 pairs of sessions" in page
    assert "| streams | no profile, k = 0 | no profile, k = 1 |" in page
    assert "| no profile | all | 15 | " in page
    assert f"\nmtp-graft serve {checkpoint.name} --profile none -k 1\n" in page
    assert f"\nmtp-graft serve {checkpoint.name} --profile none --max-model-len 4096\n" in page


@dataclass(frozen=True)
class Kill:
    """A benchmark, and when it is killed."""

    command: str
    kept: int  # after so many units, while another is being answered
    requests: int = 1  # of a unit
    times: frozenset[str] = TIMES  # what the clock decides of its result


#: With several streams at a time the clock also decides how many requests a point measures.
OF_A_LOAD = TIMES | {
    *("per_stream_tok_s", "per_stream_spread", "aggregate_tok_s", "aggregate_interval"),
    *("steps", "accepted_by_position", "acceptance_by_position", "acceptance_length"),
    *(
        "acceptance_by_position_interval",
        "ttft_ms_max",
        "acceptance",
        "requests",
        "tokens",
        "best_k",
        "dips",
    ),
}
ASKED = "--prompts PROMPTS --max-tokens 20"
KILLS = {
    "decode": Kill(f"decode --checkpoint MTP {ASKED} --rounds 5", kept=4),
    "against": Kill(f"decode --checkpoint MTP --against BASE {ASKED} --pairs 2 --rounds 1", kept=7),
    # A point has a warm-up of each stream; the interrupted one is all asked again.
    "sweep": Kill(
        f"sweep --checkpoint MTP {ASKED} --k 1,0 --streams 2,1 --requests 4",
        kept=3,
        requests=4,
        times=OF_A_LOAD,
    ),
    "workload": Kill("workload --checkpoint MTP", kept=5),
}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_a_killed_client_asks_nothing_twice_and_gives_the_same_result(
    run: Run,
    fake: Callable[..., None],
    site: Path,
    base: Path,
    grafted: Path,
    prompts_file: Path,
    tmp_path: Path,
    kill: Kill,
) -> None:
    streams, completions = tmp_path / "streams", tmp_path / "completions"
    asked = {"streams": str(streams), "requests": str(completions)}
    words = {"MTP": str(grafted), "BASE": str(base), "PROMPTS": str(prompts_file)}
    arguments = ["bench", *(words.get(word, word) for word in kill.command.split())]
    arguments += ["--log", str(tmp_path / "vllm.log"), "--run"]
    ledger, whole = (tmp_path / n / "bench" / arguments[1] / LEDGER_NAME for n in ("run", "whole"))

    kept = kill_in_the_middle(
        [sys.executable, "-c", KILLABLE, *arguments, str(tmp_path / "run")],
        *(ledger, kill.kept, lambda: num_lines(streams)),
        command_environment(site, **asked, step_s=0.005),
    )
    streams.unlink()
    completions.unlink()
    fake(**asked)
    status, _, errors = run(*arguments, tmp_path / "run")
    assert status == 0, errors
    left = units_in(ledger.read_bytes().removeprefix(kept))
    # What stands before a unit's first slash is measured on one server. Its first completion
    # shows that it is up, its first stream is a warm-up; then comes what was missing.
    servers = {unit[: unit.find("/") + 1] for unit in left}
    assert num_lines(completions) == len(servers)
    assert num_lines(streams) == len(servers) + kill.requests * len(left)

    assert run(*arguments, tmp_path / "whole")[0] == 0
    assert ledger.read_bytes().startswith(kept)
    assert units_in(ledger.read_bytes()) == units_in(whole.read_bytes())
    result, expected = (json.loads(f.with_name("result.json").read_text()) for f in (ledger, whole))
    assert without(result, kill.times) == without(expected, kill.times)


def test_ctrl_c_does_not_wait_for_streams_that_hang(
    site: Path, grafted: Path, prompts_file: Path, tmp_path: Path
) -> None:
    streams = tmp_path / "streams"
    hangs = {str(number): "hangs" for number in range(4, 20)}  # 1 to 3 are warm-ups
    words = ("bench", "sweep", "--checkpoint", grafted, "--streams", "3", "--prompts", prompts_file)
    client = subprocess.Popen(
        [sys.executable, "-c", KILLABLE, *map(str, words), "--log", str(tmp_path / "vllm.log")],
        env=command_environment(site, streams=str(streams), fails=hangs),
    )
    try:
        while num_lines(streams) < 6:
            assert client.poll() is None
            time.sleep(0.02)
        client.send_signal(signal.SIGINT)
        assert client.wait(timeout=10) != 0
    finally:
        client.kill()
        client.wait()


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


#: The command, seeing the stand-in only: the test's own patch ends with its process.
KILLABLE = """
import os, signal, sys
from importlib.metadata import Distribution, PackageNotFoundError
from mtp_graft import cli
from mtp_graft.serving import command, server

def distribution(name):
    for dist in Distribution.discover(name=name, path=os.environ["PYTHONPATH"].split(os.pathsep)):
        return dist
    raise PackageNotFoundError(name)

command.distribution = distribution
server.POLL_S = 0.02
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
cli.main()
"""
