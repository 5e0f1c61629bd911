"""Quantizing on several ranks: torchrun, gloo, the same bytes as on one."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_graft.stages.quantize import QuantizeConfig, quantize
from mtp_graft.stages.ranks import Ranks
from synthetic_capture import random_sequences, write_capture

PROGRAM = """
import sys
from pathlib import Path
from mtp_graft.stages.quantize import QuantizeConfig, quantize
quantize(*map(Path, sys.argv[1:]), QuantizeConfig(), lambda *_: None)
"""


def hashes(out: Path) -> dict[str, str]:
    units = sorted(out.glob("*/*.safetensors"))
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in units}


def test_every_unit_is_in_one_share() -> None:
    units = list(range(11))
    shares = [Ranks(rank, 3).share(units) for rank in range(3)]
    assert sorted(unit for share in shares for unit in share) == units


def test_every_rank_has_a_gpu_of_its_own() -> None:
    assert [Ranks(r, 2, r).device("cuda") for r in range(2)] == ["cuda:0", "cuda:1"]
    assert Ranks(1, 2, 1).device("cpu") == "cpu"
    assert Ranks().device("cuda") == "cuda"


TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
    *("--nproc-per-node=2", "-m", "--", "mtp_graft.cli"),
)


def start_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_the_documented_command_quantizes_on_two_ranks(tmp_path: Path, repo_root: Path) -> None:
    recipe, run = repo_root / "recipes" / "tiny.toml", tmp_path / "run"
    write_capture(run / "capture", random_sequences((40, 25, 60), hidden=256, vocab=4096))
    (run / "capture" / "manifest.json").write_text("{}")  # says that it is finished
    result = start_cli("quantize", recipe, "--run", run, "--json", tmp_path / "result.json")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("quantize: done") == 1, "one rank tells"
    assert json.loads((tmp_path / "result.json").read_text())["ranks"] == 2
    assert "quantize" in json.loads((run / "seconds.json").read_text())
    assert hashes(run / "quantize")


def test_no_other_stage_is_run_on_several_ranks(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", "mtp_graft.cli", "score", repo_root / "recipes" / "tiny.toml"]
    first = {**os.environ, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}  # as torchrun says
    result = subprocess.run(
        [*command, "--run", tmp_path], env=first, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "score: started on 2 ranks; only quantize shares its work" in result.stderr


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one(tiny_model: Path, tmp_path: Path) -> None:
    capture = tmp_path / "capture"
    write_capture(capture, random_sequences((40, 25, 60), hidden=256, vocab=4096))
    inputs = (capture, tiny_model / "upstream", tiny_model / "base")
    alone = quantize(*inputs, tmp_path / "one", QuantizeConfig(), lambda *_: None)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(program), *map(str, inputs), str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")
    together = json.loads((tmp_path / "two" / "report.json").read_text())
    assert together["ranks"] == 2
    changing = ("seconds", "peak_host_bytes", "ranks")
    assert {k: v for k, v in together.items() if k not in changing} == {
        k: v for k, v in alone.items() if k not in changing
    }
