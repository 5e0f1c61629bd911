"""What the tests of the speed benchmarks share: prompts, and a stand-in server with a client."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mtp_graft.serving import server
from mtp_graft.serving.client import Prompt, ServerClient
from mtp_graft.serving.command import ServeOptions

PROMPTS = [Prompt("a", "ab"), Prompt("b", "hello")]


def quiet(_label: str, _done: int, _total: int) -> None:
    """Report nothing."""


@contextmanager
def serving(checkpoint: Path, k: int | None = None, *extra: str) -> Iterator[ServerClient]:
    """Serve a checkpoint with the stand-in and give a client of it."""
    options = ServeOptions(checkpoint, port=0, num_speculative_tokens=k, extra_args=extra)
    log = checkpoint.with_name("vllm.log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "POLL_S", 0.02)
        with server.managed_server(options, log) as client:
            yield client
