"""Doctor's command: the corrected copy that --fix writes, and what it prints."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mtp_graft.checkpoint.shards import load_tensors, read_meta
from mtp_graft.cli import serve
from mtp_graft.cli.app import app
from mtp_graft.errors import GraftError
from mtp_graft.serving.doctor import diagnose, fix
from mtp_graft.serving.doctor.findings import KINDS
from mtp_graft.serving.doctor.hardware import find_target
from serving.doctor_defects import DEFECTS, HEAD

ON_CPU = find_target(gpu="cpu")
Plant = Callable[[str], Path]


def run(*arguments: object) -> tuple[int, Any]:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json", "-"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout) if result.stdout else None


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


#: Defects of which doctor says that --fix cures them.
FIXABLE = [name for name, (kind, _) in DEFECTS.items() if KINDS[kind].cure.startswith("--fix")]


@pytest.mark.parametrize("name", FIXABLE)
def test_fix_copies_without_defects(planted: Plant, good: Path, tmp_path: Path, name: str) -> None:
    folder, out = planted(name), tmp_path / "fixed"
    before = snapshot(folder)
    status, result = run(folder, "--gpu", "cpu", "--fix", out, "--yes")
    assert (status, result["fixed"], result["remaining"]) == (0, str(out), [])
    assert snapshot(folder) == before
    names = read_meta(out, complete=True).keys()
    assert names == read_meta(good).keys()
    expected, found = (load_tensors(each, sorted(names)[::97]) for each in (good, out))
    assert all(expected[n].view(-1).equal(found[n].view(-1)) for n in expected)
    base_shard = "model-00001-of-00003.safetensors"
    assert os.path.samefile(out / base_shard, folder / base_shard)
    assert run(out, "--gpu", "cpu", "--fix", tmp_path / "again")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fixed", "rtn"]


@given(names=st.lists(st.sampled_from(FIXABLE), min_size=2, max_size=3, unique=True))
@settings(max_examples=4, deadline=None, derandomize=True)
def test_of_several_defects_none_is_left(good: Path, names: list[str]) -> None:
    with TemporaryDirectory(dir=good.parent) as folder:
        planted, out = Path(folder, "planted"), Path(folder, "fixed")
        shutil.copytree(good, planted, copy_function=os.link)
        for name in names:
            DEFECTS[name][1](planted)
        if fix.fix_checkpoint(planted, out, diagnose(planted, ON_CPU), ON_CPU, lambda _: None):
            assert diagnose(out, ON_CPU) == []


def test_copies_if_allowed(planted: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = planted("scale-inv"), tmp_path / "fixed"
    size = f"copies {(folder / HEAD).stat().st_size:,} bytes, 1 of 4 shards"
    with pytest.raises(GraftError, match=rf"{size}.*--yes allows it"):
        run(folder, "--gpu", "cpu", "--fix", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rtn"]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    for answer in (False, True):
        monkeypatch.setattr(typer, "confirm", lambda _question, err, answer=answer: answer)
        with nullcontext() if answer else pytest.raises(GraftError, match="nothing is written"):
            serve._ask_to_copy(size)
    few = ("--gpu", "H200", "--count", "1", "--tp", "2")
    status, result = run(folder, *few, "--fix", out, "--yes")
    errors = set(result["remaining"]) - {"memory", "piecewise-graphs"}
    assert (status, errors) == (1, {"gpu-count"}), "what the hardware lacks keeps nothing from it"


def test_no_half_done_fix(planted: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out, said = planted("scale-inv"), tmp_path / "fixed", list[str]()
    found = diagnose(folder, ON_CPU)
    for place in (folder, folder / "fixed"):
        with pytest.raises(GraftError, match="already exists or is in"):
            fix.fix_checkpoint(folder, place, found, ON_CPU, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(fix, "write_index", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fix.fix_checkpoint(folder, out, found, ON_CPU, said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rtn"] and len(said) == 1


@pytest.mark.parametrize(
    ("defect", "where"),
    [("truncated-shard", HEAD), ("missing-parameter", "mtp.0.hn"), ("no-tokenizer", "tokenizer")],
)
def test_fix_refuses_other_errors(planted: Plant, tmp_path: Path, defect: str, where: str) -> None:
    planted("head-count-0"), planted("scale-inv")
    with pytest.raises(GraftError, match=rf"{where}.*: .*; --fix corrects config and names only"):
        run(planted(defect), "--gpu", "cpu", "--fix", tmp_path / "fixed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rtn"]


def test_the_status_tells_if_anything_is_wrong(good: Path, planted: Plant, tmp_path: Path) -> None:
    status, result = run(good, "--gpu", "H200", "--vllm", "0.32.1")
    assert (status, result["ok"], result["tp"], result["fixed"]) == (0, True, 1, None)
    assert result["vllm"] == "0.32.1"
    status, result = run(planted("wrong-group"), "--gpu", "cpu")
    (finding,) = result["findings"]
    keys = {"id", "severity", "where", "found", "expected", "why", "cure", "fixable", "evidence"}
    assert (status, result["ok"], finding.keys()) == (1, False, keys)
    assert finding["where"] == "mtp.0.ffn.experts.3.w2.weight_scale"
    assert finding["found"].startswith("[256, 4]") and finding["expected"].startswith("[256, 2]")
    assert run(good, "--count", "2")[0] == 2
    with pytest.raises(GraftError, match="gone: not a folder"):
        run(tmp_path / "gone", "--gpu", "cpu")
