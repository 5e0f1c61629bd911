"""The server that a benchmark measures: one that runs, or a checkpoint served meanwhile."""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from mtp_graft.cli.app import (
    NO_PROFILE,
    DraftLmHeadOption,
    DraftSampleOption,
    MaxModelLenOption,
    ServeArgument,
    TensorParallelOption,
)
from mtp_graft.cli.help import SERVER
from mtp_graft.cli.output import Report, note

if TYPE_CHECKING:  # the imports of a command load torch: `--help` need not wait for it
    from mtp_graft.bench.requests import Session
    from mtp_graft.serving.client import ServerClient
    from mtp_graft.serving.command import ServeOptions

RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run", metavar="DIR", help="Keep what is measured here, and go on if there is some."
    ),
]


#: Options that only a server of ours can follow.
_OURS_ONLY = (
    *("profile", "tensor_parallel_size", "max_model_len", "extra"),
    *("draft_lm_head_quantization", "draft_sample_method"),
)


def check_url(url: str | None) -> str | None:
    """Return an option's server address; wrong usage if it is none."""
    try:
        parts = urlsplit(url or "http://none")
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or beyond 65535
        is_address = False
    if not is_address:
        raise typer.BadParameter(f"{url}: expected http://HOST:PORT")
    return url


def _option(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=SERVER, **settings)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The options of a command that asks a server: where it is, or what to serve and how."""

    base_url: Annotated[
        str | None,
        _option(metavar="URL", callback=check_url, help="A running server's address."),
    ] = None
    checkpoint: Annotated[
        Path | None, _option(metavar="DIR", help="Serve this checkpoint meanwhile.")
    ] = None
    profile: Annotated[
        str | None,
        _option(
            metavar="NAME",
            callback=lambda name: None if name == NO_PROFILE else name,
            help="Serve --checkpoint as `mtp-graft serve --profile` does: 128k, ..., auto. "
            "Default: none.",
        ),
    ] = None
    tensor_parallel_size: TensorParallelOption = None
    max_model_len: MaxModelLenOption = None
    draft_lm_head_quantization: DraftLmHeadOption = None
    draft_sample_method: DraftSampleOption = None
    api_key: Annotated[
        str | None, _option(envvar="VLLM_API_KEY", metavar="KEY", help="The server's key.")
    ] = None
    silence_s: Annotated[
        float,
        _option(min=0.1, metavar="S", help="Seconds without a byte after which a request failed."),
    ] = 300.0
    attempts: Annotated[
        int, _option(min=1, metavar="N", help="How often a request is asked in all.")
    ] = 3
    log: Annotated[
        Path | None, _option(metavar="FILE", help="Where --checkpoint's server writes to.")
    ] = None
    extra: ServeArgument = None
    began_s: float = field(default_factory=time.perf_counter, init=False, compare=False)

    def __post_init__(self) -> None:
        if (self.base_url is None) == (self.checkpoint is None):
            raise typer.BadParameter("give one of --base-url and --checkpoint")
        if self.checkpoint is None and any(getattr(self, name) for name in _OURS_ONLY):
            raise typer.BadParameter(
                "--profile, --tensor-parallel-size, --max-model-len, --draft-* and arguments after "
                "-- need --checkpoint: a running server cannot be changed"
            )

    def check_k(self, k: object) -> None:
        """Refuse --k for a running server."""
        if k is not None and self.checkpoint is None:
            raise typer.BadParameter(
                "--k needs --checkpoint: a running server drafts what it drafts"
            )

    def num_drafts(self, k: int | None) -> int:
        """Return how many tokens the server drafts a step: `k`, its default, or what it says."""
        from mtp_graft.serving.client import ServerClient
        from mtp_graft.serving.command import ServeOptions, find_vllm, num_speculative_tokens

        if self.checkpoint is not None:
            options = ServeOptions(self.checkpoint, num_speculative_tokens=k)
            return num_speculative_tokens(options, find_vllm().platform)
        with ServerClient(str(self.base_url), self.api_key, self.silence_s) as client:
            counters = client.spec_decode_counters()
        return counters.k if counters else 0

    def identity(self) -> dict[str, Any]:
        """Return what tells this server from another when a measurement goes on."""
        from mtp_graft.checkpoint.manifest import fingerprints
        from mtp_graft.pipeline.device import device_name
        from mtp_graft.serving.command import find_vllm

        if self.checkpoint is None:
            return {"base_url": self.base_url}
        vllm = find_vllm()
        files = [self.checkpoint / "config.json", *sorted(self.checkpoint.glob("*.safetensors"))]
        return {
            **{name: getattr(self, name) for name in _OURS_ONLY},
            "files": fingerprints(files),
            "device": device_name(),
            "vllm": f"{vllm.version} ({vllm.platform})",
        }

    def folder(self, run: Path | None, benchmark: str) -> Path | None:
        """Return the benchmark's part of a run folder; profiles are kept apart."""
        name = benchmark if self.profile is None else f"{benchmark}-{self.profile}"
        return run and run / "bench" / name

    def session(self, folder: Path | None, claim: dict[str, Any]) -> "Session":
        """Return what was measured in the folder so far; `claim` is more than this server."""
        from mtp_graft.bench.requests import open_session

        return open_session(folder, claim | {"server": self.identity()}, self.attempts)

    @contextmanager
    def client(
        self, report: Report, name: str = "", num_speculative_tokens: int | None = None
    ) -> Iterator["ServerClient"]:
        """Give a client of the server, which is started and stopped if it is ours.

        `name` tells its log from those of other starts.
        """
        from mtp_graft.serving.client import ServerClient
        from mtp_graft.serving.server import managed_server

        if self.checkpoint is None:
            with ServerClient(str(self.base_url), self.api_key, self.silence_s) as client:
                yield client
            return
        options = self._options(self.checkpoint, num_speculative_tokens)
        log = self.log or Path(tempfile.mkdtemp(prefix="mtp-graft-")) / "vllm.log"
        log = log.with_stem(f"{log.stem}-{name}") if name else log
        note(f"server log: {log}")

        def on_start(elapsed_s: float) -> None:
            report(f"{name or 'server'}: starting vLLM, {elapsed_s:.0f} s", 0, 0)

        with (
            managed_server(options, log, on_start=on_start) as running,
            ServerClient(running.base_url, self.api_key, self.silence_s) as client,
        ):
            yield client

    def _options(self, checkpoint: Path, num_speculative_tokens: int | None) -> "ServeOptions":
        from mtp_graft.serving.command import ServeOptions, find_vllm
        from mtp_graft.serving.plan import make_plan
        from mtp_graft.serving.topology import hardware_for

        drafts = num_speculative_tokens != 0
        options = ServeOptions(
            checkpoint,
            port=0,
            tensor_parallel_size=self.tensor_parallel_size,
            max_model_len=self.max_model_len,
            num_speculative_tokens=num_speculative_tokens,
            draft_sample_method=self.draft_sample_method if drafts else None,
            draft_lm_head_quantization=self.draft_lm_head_quantization if drafts else None,
            prefix_caching=False,  # a prompt that comes again is computed again
            api_key=self.api_key,
            extra_args=tuple(self.extra or ()),
        )
        if self.profile is None:
            return options
        plan = make_plan(options, self.profile, hardware_for(find_vllm().platform))
        for text in plan.notes:
            note(f"plan: {text}")
        return plan.options


def keep_result(result: dict[str, Any], folder: Path | None, target: Target) -> None:
    """Write `result.json` and `manifest.json` into a benchmark's part of the run folder, if any.

    A running server's device is not known here: the manifest names its address instead. A call that
    found everything measured leaves both as they are.
    """
    from mtp_graft.checkpoint.files import write_json
    from mtp_graft.checkpoint.manifest import CONFIG_NAME, read_result, write_manifest
    from mtp_graft.pipeline.device import device_name

    if folder is None:
        return
    path = folder / "result.json"
    if (folder / "manifest.json").exists() and read_result(path) == result:
        return
    write_json(result, path)
    config = json.loads((folder / CONFIG_NAME).read_text())
    device = device_name() if target.checkpoint else f"server at {target.base_url}"
    seconds = time.perf_counter() - target.began_s
    write_manifest(folder, f"bench {folder.name}", config, (), device, seconds)
