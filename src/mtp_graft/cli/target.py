"""What all benchmarks have: a server, one that runs or a checkpoint served meanwhile; a result."""

import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtp_graft.cli.app import (
    NO_PROFILE,
    JsonOption,
    MaxModelLenOption,
    ServeArgument,
    TensorParallelOption,
    option,
)
from mtp_graft.cli.output import Report, note

if TYPE_CHECKING:  # the imports of a command load torch: `--help` need not wait for it
    from mtp_graft.serving.client import ServerClient
    from mtp_graft.serving.command import ServeOptions

_URL = re.compile(r"https?://(\[[\da-fA-F:.]+\]|[^\s:/]+)(:[1-9]\d{0,4})?(/\S*)?")


def check_url(url: str | None) -> str | None:
    """Return a server's address; wrong usage if it is none."""
    if url is not None and not _URL.fullmatch(url):
        raise typer.BadParameter(f"{url}: expected http://HOST:PORT")
    return url


@dataclass(frozen=True, kw_only=True)
class Target:
    """The options of a command that asks a server: which one, and where the result goes."""

    base_url: Annotated[
        str | None, option("URL", "A running server's address.", callback=check_url)
    ] = None
    checkpoint: Annotated[Path | None, option("DIR", "Serve this checkpoint meanwhile.")] = None
    profile: Annotated[str, option("NAME", "As `mtp-graft serve` has it.")] = NO_PROFILE
    tensor_parallel_size: TensorParallelOption = None
    max_model_len: MaxModelLenOption = None
    api_key: Annotated[str | None, option("KEY", "The server's key.", envvar="VLLM_API_KEY")] = None
    run: Annotated[
        Path | None, option("DIR", "Keep the result here, and go on from what there is.")
    ] = None
    json_file: JsonOption = None
    extra: ServeArgument = None

    def __post_init__(self) -> None:
        if (self.base_url is None) == (self.checkpoint is None):
            raise typer.BadParameter("give one of --base-url and --checkpoint")
        is_plain = self.profile == NO_PROFILE and not self._fixed() and not self.extra
        if self.checkpoint is None and not is_plain:
            raise typer.BadParameter(
                "--profile, --tensor-parallel-size, --max-model-len and arguments after -- need "
                "--checkpoint: a running server cannot be changed"
            )

    def _fixed(self) -> dict[str, Any]:
        names = ("tensor_parallel_size", "max_model_len")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def num_drafts(self, k: int | None) -> int:
        """Return how many tokens the server drafts a step: `k`, its default, or what it says.

        Wrong usage for a `k` that a running server would have to follow.
        """
        from mtp_graft.serving.client import ServerClient
        from mtp_graft.serving.command import ServeOptions, find_vllm, num_speculative_tokens

        if self.checkpoint is not None:
            options = ServeOptions(self.checkpoint, num_speculative_tokens=k)
            return num_speculative_tokens(options, find_vllm().platform)
        if k is not None:
            raise typer.BadParameter("--k needs --checkpoint: a running server drafts as it does")
        with ServerClient(str(self.base_url), self.api_key) as client:
            counters = client.spec_decode_counters()
        return counters.k if counters else 0

    def identity(self, k: int | None = None) -> dict[str, Any]:
        """Return what tells this server from another; of ours `serve`, a command that serves so."""
        from mtp_graft.checkpoint.manifest import fingerprints
        from mtp_graft.pipeline.device import device_name
        from mtp_graft.serving.command import find_vllm

        if self.checkpoint is None:
            return {"base_url": self.base_url}
        words = ["mtp-graft", "serve", self.checkpoint.name, "--profile", self.profile]
        for name, value in self._fixed().items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        words += [] if k is None else ["-k", str(k)]
        words += ["--", *self.extra] if self.extra else []
        files = [self.checkpoint / "config.json", *sorted(self.checkpoint.glob("*.safetensors"))]
        return {
            "serve": shlex.join(words),
            "files": fingerprints(files),
            "device": device_name(),
            "vllm": "{0.version} ({0.platform})".format(find_vllm()),
        }

    def finish(
        self,
        benchmark: str,
        claim: dict[str, Any],
        measure: Callable[[Path | None], dict[str, Any]],
    ) -> dict[str, Any]:
        """Measure and return the result; keep it in the run folder, if there is one.

        `claim` is all that decides what is measured of a server, `k` included. `measure` gets the
        folder; a call that finds everything measured there changes nothing. Raises GraftError if
        the folder was begun with another claim.
        """
        if self.run is None:
            return measure(None)
        from mtp_graft.checkpoint.files import write_json
        from mtp_graft.checkpoint.manifest import claim_folder, read_result, write_manifest
        from mtp_graft.pipeline.device import device_name

        name = benchmark if self.profile == NO_PROFILE else f"{benchmark}-{self.profile}"
        folder, started = self.run / "bench" / name, time.perf_counter()
        claim = claim | {"server": self.identity(claim.get("k"))}
        claim_folder(folder, claim)
        result, path = measure(folder), folder / "result.json"
        if (folder / "manifest.json").exists() and read_result(path) == result:
            return result
        write_json(result, path)
        # A running server's device is not known here.
        device = device_name() if self.checkpoint else f"server at {self.base_url}"
        seconds = time.perf_counter() - started
        write_manifest(folder, f"bench {name}", claim, (), device, seconds)
        return result

    @contextmanager
    def client(self, report: Report, name: str, k: int | None = None) -> Iterator["ServerClient"]:
        """Give a client of the server; one of ours drafts `k`, and `name` is its log's."""
        from mtp_graft.serving.client import ServerClient
        from mtp_graft.serving.server import managed_server

        if self.checkpoint is None:
            with ServerClient(str(self.base_url), self.api_key) as client:
                yield client
            return
        log = Path(tempfile.mkdtemp(prefix="mtp-graft-")) / f"vllm-{name}.log"
        note(f"server log: {log}")

        def on_start(elapsed_s: float) -> None:
            report(f"{name}: starting vLLM, {elapsed_s:.0f} s", 0, 0)

        options = self._serve_options(self.checkpoint, k)
        with managed_server(options, log, on_start=on_start) as client:
            yield client

    def _serve_options(self, checkpoint: Path, k: int | None) -> "ServeOptions":
        from mtp_graft.serving.command import ServeOptions, find_vllm
        from mtp_graft.serving.plan import make_plan
        from mtp_graft.serving.topology import hardware_for

        options = ServeOptions(
            checkpoint,
            port=0,
            num_speculative_tokens=k,
            prefix_caching=False,  # a prompt that comes again is computed again
            api_key=self.api_key,
            extra_args=tuple(self.extra or ()),
            **self._fixed(),
        )
        if self.profile == NO_PROFILE:
            return options
        plan = make_plan(options, self.profile, hardware_for(find_vllm().platform))
        for text in plan.notes:
            note(f"plan: {text}")
        return plan.options
