"""What the tests of the speed benchmarks share: prompts, and a stand-in server with a client."""

from pathlib import Path
from typing import Any

from mtp_graft.serving.client import Prompt
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.server import managed_server

PROMPTS = [Prompt("a", "ab"), Prompt("b", "hello")]


def quiet(_label: str, _done: int, _total: int) -> None:
    """Report nothing."""


def serving(checkpoint: Path, k: int | None = None, *extra: str) -> Any:
    """Serve a checkpoint with the stand-in inside the block; give a client."""
    options = ServeOptions(checkpoint, port=0, num_speculative_tokens=k, extra_args=extra)
    return managed_server(options, checkpoint.with_name("vllm.log"))
