"""Fixtures and the rules of the markers that all tests share."""

import gc
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from workers import keep_to_own_cores

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., tuple[int, str, str]]
MEASURED = "measured"  # the user property of a test that measures something

#: Variables that change what the code under test does. A user may have set them for their own runs.
SETTINGS = ("HF_", "HUGGING_FACE_", "MTP_GRAFT_", "NCCL_", "TRANSFORMERS_", "VLLM_")
FOR_TESTS = {f"MTP_GRAFT_{n}" for n in ["DATA", "KILLS", "MEASURED", "MUTANTS", "WRITE_GOLDEN"]}
# Before anything is imported that reads them: nothing of the user's settings, token or hub cache.
for name in [n for n in os.environ if n.startswith(SETTINGS) and n not in FOR_TESTS]:
    del os.environ[name]
EMPTY_HUB = tempfile.TemporaryDirectory(prefix="mtp-graft-hub-")
os.environ["HF_HOME"] = EMPTY_HUB.name
os.fsync = lambda _file: None  # no test loses power, and disks take half of the time; runs do it

keep_to_own_cores()  # before anything counts them


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage() -> Iterator[None]:
    """Collecting garbage among all that tests import takes a tenth of the time."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    yield
    gc.unfreeze()  # else libraries report leaks


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
    return ROOT


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The bundled tiny model's folder; it ships with the repository, so tests never skip it."""
    folder = ROOT / "models" / "tiny-dsv4"
    assert folder.is_dir(), f"{folder}: the bundled model is missing from this checkout"
    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundled base, where links to it can be made; not to be changed."""
    return Path(shutil.copytree(tiny_model / "base", tmp_path_factory.mktemp("tiny") / "base"))


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """The same by links, for changes, which replace files and never write to them."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base", copy_function=os.link))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder, which is not there yet."""
    return tmp_path / "run"


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for the hub that has the bundled model as two repositories."""
    from hub_stand_in import BASE, UPSTREAM, as_repository, in_place_of_the_hub

    folders = {BASE: tiny_model / "base", UPSTREAM: tiny_model / "upstream"}
    repositories = {repo: as_repository(folder) for repo, folder in folders.items()}
    with in_place_of_the_hub(repositories, tmp_path / "hub", monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="session")
def quantized(tiny_model: Path, tiny_base: Path) -> Path:
    """A quantize stage's folder for the bundled head; not to be changed."""
    from mtp_graft.checkpoint.shards import load_tensors
    from quantized import write_quantized

    return write_quantized(tiny_base.with_name("quantize"), load_tensors(tiny_model / "upstream"))


@pytest.fixture(scope="session")
def spliced(tiny_model: Path, tiny_base: Path, quantized: Path) -> dict[str, Path]:
    """Checkpoints of `tiny_base` with each variant of the bundled head; not to be changed."""
    from mtp_graft.recipe import ALL_VARIANTS as VARIANTS
    from mtp_graft.stages.splice import splice

    folders = {variant: tiny_base.with_name(variant) for variant in VARIANTS}
    for variant in VARIANTS:
        given = quantized if variant == "gptq" else None
        splice(tiny_base, tiny_model / "upstream", folders[variant], variant, quantized=given)
    return folders


@pytest.fixture(scope="session")
def dspark(repo_root: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upstream with a DSpark drafter of three stages for the bundled base; random weights."""
    from torch import Generator

    from test_scripts import load

    config = json.loads((tiny_model / "make" / "config.json").read_text())
    config |= {"dspark_block_size": 5, "dspark_markov_rank": 16, "dspark_noise_token_id": 4095}
    config |= {"dspark_target_layer_ids": [1, 2, 3], "num_nextn_predict_layers": 1}
    folder = tmp_path_factory.mktemp("dspark") / "upstream"
    load("synthetic_flash").write_upstream(folder, config, None, Generator().manual_seed(0))
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a result of everything and its card; not to be changed."""
    from mtp_graft.bench.card import write_card
    from run_folder import whole_run

    run = tmp_path_factory.mktemp("finished") / "run"
    whole_run(run)
    write_card(run, run / "card")
    return run


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command in this process: exit status, output and errors."""
    from mtp_graft import cli

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mtp-graft", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capfd.readouterr()

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("mtp_graft.serving.server.POLL_S", 0.02)
    return call


@pytest.fixture
def mtp_graft(run_command: Run) -> Callable[..., Any]:
    """Return a function that runs a command in this process: its JSON, or the error's line."""

    def call(*words: object) -> Any:
        status, out, errors = run_command(*words, "--json", "-")
        if status == 0:
            return json.loads(out)
        assert status == 1, errors
        return next(line for line in errors.splitlines() if line.startswith("error: "))

    return call


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CUDA build of torch, which must not be asked in this process."""
    import torch

    from mtp_graft.stages.parallel import gpus

    gpus.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("_lazy_init", "is_available", "device_count", "get_device_name", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("asked in this process"))
    yield
    gpus.cache_clear()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public benchmark data that is not in the repository: gsm8k/, human_eval/, mmlu/, text/."""
    named = os.environ.get("MTP_GRAFT_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        assert not named, f"MTP_GRAFT_DATA names {folder}, which is not a folder"
        pytest.skip(f"no benchmark data: {folder} does not exist; set MTP_GRAFT_DATA to have it")
    return folder


@pytest.fixture(scope="session")
def sandbox() -> None:
    """Skip where generated code cannot be confined, as in many containers."""
    from mtp_graft.bench.evals.sandbox import find_python
    from mtp_graft.errors import GraftError

    try:
        find_python()
    except GraftError as error:
        pytest.skip(str(error))


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
    has_kernels = "avx512f" in Path("/proc/cpuinfo").read_text() or cuda_is_there()
    for item in items:
        if item.get_closest_marker("gpu") and not cuda_is_there():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif item.get_closest_marker("vllm") and no_vllm:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
        elif item.get_closest_marker("serves") and not has_kernels:
            item.add_marker(pytest.mark.skip(reason="no AVX-512, so vLLM serves no DeepSeek-V4"))


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
