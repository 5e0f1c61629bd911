"""Fixtures and the rules of the markers that all tests share."""

import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from workers import keep_to_own_cores

ROOT = Path(__file__).resolve().parent.parent
MEASURED = "measured"  # the user property of a test that measures something

#: Variables that change what the code under test does. A user may have set them for their own runs.
SETTINGS = ("HF_", "HUGGING_FACE_", "MTP_GRAFT_", "NCCL_", "TRANSFORMERS_", "VLLM_")
FOR_TESTS = {"MTP_GRAFT_DATA", "MTP_GRAFT_MEASURED", "MTP_GRAFT_WRITE_GOLDEN"}
# Before anything is imported that reads them: nothing of the user's settings, token or hub cache.
for name in [n for n in os.environ if n.startswith(SETTINGS) and n not in FOR_TESTS]:
    del os.environ[name]
EMPTY_HUB = tempfile.TemporaryDirectory(prefix="mtp-graft-hub-")
os.environ["HF_HOME"] = EMPTY_HUB.name

keep_to_own_cores()  # before anything counts them


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands' default folders are below the working directory, where a user may have runs."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def root_logger_level() -> Iterator[None]:
    """Inspect sets the root logger's level for good; other tests read what is logged."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The bundled tiny model's folder; it ships with the repository, so tests never skip it."""
    folder = ROOT / "models" / "tiny-dsv4"
    assert folder.is_dir(), f"{folder}: the bundled model is missing from this checkout"
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public benchmark data that is not in the repository: gsm8k/, human_eval/, mmlu/, text/."""
    named = os.environ.get("MTP_GRAFT_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        assert not named, f"MTP_GRAFT_DATA names {folder}, which is not a folder"
        pytest.skip(f"no benchmark data: {folder} does not exist; set MTP_GRAFT_DATA to have it")
    return folder


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a test measures: shown in the summary, and written to $MTP_GRAFT_MEASURED if set."""
    values: dict[str, Any] = {}
    request.node.user_properties.append((MEASURED, values))
    return values


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put slow tests first; skip what this machine cannot run (`-ra` says so in the summary)."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    no_vllm = importlib.util.find_spec("vllm") is None
    for item in items:
        if item.get_closest_marker("gpu") and not cuda_is_there():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif item.get_closest_marker("vllm") and no_vllm:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@cache
def cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    measured = {
        report.nodeid.rpartition("::")[2]: dict(report.user_properties)[MEASURED]
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call" and MEASURED in dict(report.user_properties)
    }
    for test, values in measured.items():
        terminalreporter.write_line(f"measured by {test}: {json.dumps(values)}")
    file = os.environ.get("MTP_GRAFT_MEASURED")
    if file and measured:
        Path(file).write_text(json.dumps(measured, indent=2) + "\n")
