"""Real engines for the tests: each configuration is started once a session, in its own process."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mtp_graft.stages.splice import splice

HERE = Path(__file__).parent
MAX_MARGIN = 0.5  # nats; above it a different token is no rounding matter

Job = dict[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The bundled base, and the same with its head in BF16."""

    base: Path
    spliced: Path


@pytest.fixture(scope="session")
def checkpoints(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    spliced = tmp_path_factory.mktemp("checkpoint") / "tiny-bf16"
    splice(tiny_model / "base", tiny_model / "upstream", spliced, "bf16")
    return Checkpoints(tiny_model / "base", spliced)


@pytest.fixture(scope="session")
def text(tiny_model: Path) -> list[int]:
    """The token ids of all bundled prompts, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model / "base")
    lines = (tiny_model / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["text"] for line in lines]
    return [t for prompt in prompts for t in tokenizer.encode(prompt, add_special_tokens=False)]


@pytest.fixture(scope="session")
def prompts_of(text: list[int]) -> Callable[[int], list[int]]:
    """Return a function that gives a prompt of any length from the bundled text."""
    endless = text * (4096 // len(text) + 1)

    def prompt(length: int, start: int = 0) -> list[int]:
        start %= len(text)
        return endless[start : start + length]

    return prompt


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], list[Any]]:
    """Return a function that runs a job (see engine_job.py) and gives its batches' results."""

    def run(job: Job) -> list[Any]:
        folder = tmp_path_factory.mktemp("engine")
        (folder / "job.json").write_text(json.dumps(job))
        command = [sys.executable, str(HERE / "engine_job.py"), "job.json", "result.json"]
        with (folder / "log").open("w") as log:
            done = subprocess.run(
                command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, timeout=900, check=False
            )
        tail = "\n".join((folder / "log").read_text().splitlines()[-30:])
        assert done.returncode == 0, f"the engine failed; the end of its log:\n{tail}"
        batches: list[Any] = json.loads((folder / "result.json").read_text())["batches"]
        return batches

    return run
