"""What the tests of the speed benchmarks share: prompts, and a stand-in server with a client."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtp_graft.serving import server
from mtp_graft.serving.client import Prompt, ServerClient
from mtp_graft.serving.command import ServeOptions

PROMPTS = [Prompt("a", "ab"), Prompt("b", "hello")]


def quiet(_label: str, _done: int, _total: int) -> None:
    """Report nothing."""


@contextmanager
def serving(
    checkpoint: Path, log: Path, k: int | None = None, silence_s: float = 5.0
) -> Iterator[ServerClient]:
    """Serve a checkpoint with the stand-in and give a client of it."""
    options = ServeOptions(checkpoint, port=0, num_speculative_tokens=k)
    with (
        server.managed_server(options, log) as running,
        ServerClient(running.base_url, silence_s=silence_s) as client,
    ):
        yield client
