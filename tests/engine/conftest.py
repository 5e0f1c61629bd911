"""Real engines for the tests: each configuration is started once a session, in its own process."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from mtp_graft.serving.client import ServerClient
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


def gauge(server: ServerClient, name: str) -> float:
    """Return one of the server's metrics, summed over its labels."""
    page = httpx.get(f"{server.base_url}/metrics", timeout=30).text
    return sum(
        float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(name)
    )


def wait_until_idle(server: ServerClient) -> None:
    """Wait until the server has ended the requests of a client that is gone."""
    deadline = time.monotonic() + 30
    time.sleep(0.3)  # what had just come is counted by then
    while gauge(server, "vllm:num_requests_running") + gauge(server, "vllm:num_requests_waiting"):
        assert time.monotonic() < deadline, "a request goes on without its client"
        time.sleep(0.1)
