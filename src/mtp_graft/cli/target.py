"""The server that a benchmark measures: one that runs, or a checkpoint served meanwhile."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtp_graft.cli.output import Report, note

if TYPE_CHECKING:  # the imports of a command load torch: `--help` need not wait for it
    from mtp_graft.bench.streams import BenchClient, Retrying

BaseUrlOption = Annotated[str | None, typer.Option(help="A running server's address.")]
CheckpointOption = Annotated[Path | None, typer.Option(help="Serve this folder meanwhile.")]
PromptsOption = Annotated[
    Path | None, typer.Option(help='JSON Lines of {"id", "text"}. Default: the tiny model\'s.')
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use the first prompts only.")]
IgnoreEosOption = Annotated[bool, typer.Option(help="Go on after an end-of-sequence token.")]
MaxModelLenOption = Annotated[int | None, typer.Option(min=1, help="Longest sequence.")]
ApiKeyOption = Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="The key.")]
LogOption = Annotated[Path | None, typer.Option(help="Where the server's output goes.")]
SilenceOption = Annotated[
    float, typer.Option(min=0.1, help="Seconds without a byte after which a request failed.")
]
AttemptsOption = Annotated[int, typer.Option(min=1, help="How often a request is asked in all.")]
RunOption = Annotated[
    Path | None,
    typer.Option("--run", help="Keep what is measured here, and go on if there is some."),
]
ServeArgument = Annotated[
    list[str] | None, typer.Argument(help="After --: arguments for vllm serve, as they are.")
]
SILENCE_S = 300.0
ATTEMPTS = 3


@dataclass(frozen=True)
class Target:
    """Where a server is, or what to serve and how; exactly one of the first two is given."""

    base_url: str | None
    checkpoint: Path | None
    api_key: str | None = None
    silence_s: float = SILENCE_S
    max_model_len: int | None = None
    extra_args: tuple[str, ...] = ()
    log: Path | None = None

    def __post_init__(self) -> None:
        if (self.base_url is None) == (self.checkpoint is None):
            raise typer.BadParameter("give one of --base-url and --checkpoint")
        if self.checkpoint is None and (self.max_model_len is not None or self.extra_args):
            raise typer.BadParameter(
                "--max-model-len and arguments after -- need --checkpoint: a running server "
                "cannot be changed"
            )

    def identity(self) -> dict[str, Any]:
        """Return what tells this server from another when a measurement goes on."""
        from mtp_graft.checkpoint.manifest import fingerprints

        if self.checkpoint is None:
            return {"base_url": self.base_url}
        files = [self.checkpoint / "config.json", *sorted(self.checkpoint.glob("*.safetensors"))]
        return {
            "files": fingerprints(files),
            "max_model_len": self.max_model_len,
            "extra_args": list(self.extra_args),
        }

    @contextmanager
    def client(
        self, report: Report, name: str = "", num_speculative_tokens: int | None = None
    ) -> Iterator["BenchClient"]:
        """Give a client of the server, which is started and stopped if it is ours.

        `name` tells its log from those of other starts.
        """
        from mtp_graft.bench.streams import BenchClient
        from mtp_graft.serving.command import ServeOptions
        from mtp_graft.serving.server import managed_server

        if self.checkpoint is None:
            assert self.base_url is not None
            with BenchClient(self.base_url, self.api_key, self.silence_s) as client:
                yield client
            return
        options = ServeOptions(
            self.checkpoint,
            port=0,
            max_model_len=self.max_model_len,
            num_speculative_tokens=num_speculative_tokens,
            prefix_caching=False,  # a prompt that comes again is computed again
            api_key=self.api_key,
            extra_args=self.extra_args,
        )
        log = self._log_file(name)
        note(f"server log: {log}")

        def on_start(elapsed_s: float, _line: str) -> None:
            report(f"{name or 'server'}: starting vLLM, {elapsed_s:.0f} s", 0, 0)

        with (
            managed_server(options, log, on_start=on_start) as running,
            BenchClient(running.base_url, self.api_key, self.silence_s) as client,
        ):
            yield client

    def _log_file(self, name: str) -> Path:
        log = self.log or Path(tempfile.mkdtemp(prefix="mtp-graft-")) / "vllm.log"
        return log.with_stem(f"{log.stem}-{name}") if name else log


def retry_policy(attempts: int) -> Callable[[], "Retrying"]:
    """Return what makes a fresh count of failures."""
    from mtp_graft.bench.streams import Retrying

    return lambda: Retrying(attempts)


def prompts_of(file: Path | None, limit: int | None) -> list[Any]:
    """Return the prompts of `file`, or the bundled ones."""
    from mtp_graft.serving.prompts import load_prompts

    return list(load_prompts(file or _bundled_prompts(), limit))


def _bundled_prompts() -> Path:
    from mtp_graft.pipeline import find_bundled_recipe
    from mtp_graft.recipe import load_recipe

    return Path(load_recipe(find_bundled_recipe()).bench.prompts)


def keep_result(result: dict[str, Any], folder: Path | None) -> None:
    """Write `result.json` into a benchmark's part of the run folder, if there is one."""
    from mtp_graft.checkpoint.shards import write_json

    if folder is not None:
        write_json(result, folder / "result.json")
