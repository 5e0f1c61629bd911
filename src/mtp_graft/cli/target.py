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
    from mtp_graft.bench.ledger import Ledger
    from mtp_graft.bench.streams import BenchClient, Retrying
    from mtp_graft.serving.command import ServeOptions

PromptsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help='JSON Lines of {"id", "text"}. Default: the tiny model\'s.'),
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Use the first prompts only.")
]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, metavar="T", help="0 is greedy; above, texts are not compared.")
]
IgnoreEosOption = Annotated[bool, typer.Option(help="Go on after an end-of-sequence token.")]
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run", metavar="DIR", help="Keep what is measured here, and go on if there is some."
    ),
]


def check_url(url: str | None) -> str | None:
    """Return an option's server address; wrong usage if it is none."""
    if url is None:
        return None
    try:
        parts = urlsplit(url)
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
        ours_only = (self.profile, self.tensor_parallel_size, self.max_model_len, self.extra)
        if self.checkpoint is None and (any(ours_only) or self.drafting):
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

    @property
    def drafting(self) -> dict[str, str]:
        """Return what is said of the drafts, by ServeOptions' names."""
        given = {
            "draft_lm_head_quantization": self.draft_lm_head_quantization,
            "draft_sample_method": self.draft_sample_method,
        }
        return {name: value for name, value in given.items() if value is not None}

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
            "files": fingerprints(files),
            "profile": self.profile,
            "tensor_parallel_size": self.tensor_parallel_size,
            "max_model_len": self.max_model_len,
            "extra_args": self.extra or [],
            **self.drafting,
            "device": device_name(),
            "vllm": f"{vllm.version} ({vllm.platform})",
        }

    def folder(self, run: Path | None, benchmark: str) -> Path | None:
        """Return the benchmark's part of a run folder; profiles are kept apart."""
        name = benchmark if self.profile is None else f"{benchmark}-{self.profile}"
        return run and run / "bench" / name

    def retrying(self) -> "Retrying":
        """Return a fresh count of failures."""
        from mtp_graft.bench.streams import Retrying

        return Retrying(self.attempts)

    @contextmanager
    def client(
        self, report: Report, name: str = "", num_speculative_tokens: int | None = None
    ) -> Iterator["BenchClient"]:
        """Give a client of the server, which is started and stopped if it is ours.

        `name` tells its log from those of other starts.
        """
        from mtp_graft.bench.streams import BenchClient
        from mtp_graft.serving.server import managed_server

        if self.checkpoint is None:
            assert self.base_url is not None
            with BenchClient(self.base_url, self.api_key, self.silence_s) as client:
                yield client
            return
        options = self._options(self.checkpoint, num_speculative_tokens)
        log = self._log_file(name)
        note(f"server log: {log}")

        def on_start(elapsed_s: float, _line: str) -> None:
            report(f"{name or 'server'}: starting vLLM, {elapsed_s:.0f} s", 0, 0)

        with (
            managed_server(options, log, on_start=on_start) as running,
            BenchClient(running.base_url, self.api_key, self.silence_s) as client,
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

    def _log_file(self, name: str) -> Path:
        log = self.log or Path(tempfile.mkdtemp(prefix="mtp-graft-")) / "vllm.log"
        return log.with_stem(f"{log.stem}-{name}") if name else log


def prompts_of(file: Path | None, limit: int | None) -> list[Any]:
    """Return the prompts of `file`, or the bundled ones."""
    from mtp_graft.serving.prompts import load_prompts

    return list(load_prompts(file or _bundled_prompts(), limit))


def _bundled_prompts() -> Path:
    from mtp_graft.pipeline import find_bundled_recipe
    from mtp_graft.recipe import load_recipe

    return Path(load_recipe(find_bundled_recipe()).bench.prompts)


def keep_result(
    result: dict[str, Any], folder: Path | None, target: Target, ledger: "Ledger"
) -> dict[str, Any]:
    """Write `result.json` and `manifest.json` into a benchmark's part of the run folder, if any.

    A running server's device is not known here: the manifest names its address instead. A call that
    found everything measured leaves the manifest as it is. Returns the result: of such a call, with
    the failures of the one that measured.
    """
    from mtp_graft.checkpoint.manifest import CONFIG_NAME, read_result, write_manifest
    from mtp_graft.checkpoint.shards import write_json
    from mtp_graft.pipeline.device import device_name

    if folder is None:
        return result
    path = folder / "result.json"
    is_finished = (folder / "manifest.json").exists() and not ledger.has_grown
    kept = read_result(path) if is_finished else None
    if kept is not None and "errors" in kept:
        result |= {key: kept[key] for key in ("errors", "failures")}
    write_json(result, path)
    if kept is None:
        config = json.loads((folder / CONFIG_NAME).read_text())
        device = device_name() if target.checkpoint else f"server at {target.base_url}"
        seconds = time.perf_counter() - target.began_s
        write_manifest(folder, f"bench {folder.name}", config, (), device, seconds)
    return result
