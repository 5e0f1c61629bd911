"""Real engines for the tests: each configuration is started once a session, all in one process."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

MAX_MARGIN = 0.5  # nats; above it a different token is no rounding matter

Batches = dict[str, Any]  # by name; prompts, and what came of them
RunEngine = Callable[..., Batches]


@pytest.fixture(scope="session")
def prompts_of(tiny_model: Path) -> Callable[..., list[int]]:
    """Return a function that gives a prompt of any length from the bundled text, as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model / "base")
    lines = (tiny_model / "prompts.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    text = [t for each in texts for t in tokenizer.encode(each, add_special_tokens=False)]
    endless = text * (4096 // len(text) + 1)

    def prompt(length: int, start: int = 0) -> list[int]:
        return endless[start % len(text) :][:length]

    return prompt


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunEngine]:
    """Return a function that starts an engine (see engine_job.py) and gives its batches' results.

    All engines run in one process, one after the other: importing vLLM takes ten seconds of a core.
    """
    folder = tmp_path_factory.mktemp("engine")
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, str(Path(__file__).with_name("engine_job.py"))]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, cwd=folder, stderr=log, **streams) as process,
    ):

        def run(checkpoint: Path, batches: Batches, k: int = 0, **more: Any) -> Batches:
            job = {"checkpoint": str(checkpoint), "k": k, "batches": [*batches.values()], **more}
            print(json.dumps(job), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, f"the engine failed: {(folder / 'log').read_text()[-4000:]}"
            return dict(zip(batches, json.loads(answer), strict=True))

        yield run
