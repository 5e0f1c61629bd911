"""What all benchmarks have: a server, one that runs or a checkpoint served meanwhile; a result."""

import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mtp_graft.cli.app import JSON_FILE, NO_PROFILE, SERVE_ARGUMENTS
from mtp_graft.cli.output import Report, note
from mtp_graft.serving import command
from mtp_graft.serving.command import ServeOptions, find_vllm, option

if TYPE_CHECKING:  # the imports of a command load torch: `--help` need not wait for it
    from mtp_graft.serving.client import ServerClient

#: JSON.
Result = dict[str, Any]
_URL = re.compile(r"https?://(\[[\da-fA-F:.]+\]|[^\s:/]+)(:[1-9]\d{0,4})?(/\S*)?")


def check_url(url: str | None) -> str | None:
    """Return a server's address; wrong usage if it is none."""
    if url is not None and not _URL.fullmatch(url):
        raise typer.BadParameter(f"{url}: expected http://HOST:PORT")
    return url


LOG = option(None, "FILE", "Log of a server started here. Default: a temporary one.")


def started(
    options: ServeOptions, report: Report, name: str, log: Path | None = None
) -> AbstractContextManager[Any]:
    """Serve inside the block; `name` is the log's if it has none."""
    from mtp_graft.serving.server import managed_server

    log = log or Path(tempfile.mkdtemp(prefix="mtp-graft-")) / f"vllm-{name}.log"
    note(f"server log: {log}")
    return managed_server(options, log, report)


@command.option_group
class Target:
    """The options of a command that asks a server: which one, and where the result goes."""

    base_url: str | None = option(None, "URL", "A running server's address.", callback=check_url)
    checkpoint: Path | None = option(None, "DIR", "Serve this checkpoint meanwhile.")
    profile: str | None = option(None, "NAME", "As `serve` has it. Default on GPUs: auto.")
    tensor_parallel_size: int | None = command.TENSOR_PARALLEL_SIZE
    max_model_len: int | None = command.MAX_MODEL_LEN
    api_key: str | None = option(None, "KEY", "The server's key.", envvar="VLLM_API_KEY")
    run: Path | None = option(None, "DIR", "Keep the result here, and go on from what there is.")
    log: Path | None = LOG
    json_file: Path | None = JSON_FILE
    extra: tuple[str, ...] = SERVE_ARGUMENTS

    def __post_init__(self) -> None:
        if (self.base_url is None) == (self.checkpoint is None):
            raise typer.BadParameter("give one of --base-url and --checkpoint")
        decided = (self.tensor_parallel_size, self.max_model_len, self.extra)
        if self.checkpoint is None and (self.profile not in (None, NO_PROFILE) or any(decided)):
            flags = "--profile, --tensor-parallel-size, --max-model-len and arguments after --"
            raise typer.BadParameter(f"{flags} need --checkpoint: a running server is as it is")
        if self.profile is None:
            on_gpus = self.checkpoint and find_vllm().platform != "cpu"
            object.__setattr__(self, "profile", "auto" if on_gpus else NO_PROFILE)

    def num_drafts(self, k: int | None) -> int:
        """Return how many tokens the server drafts a step: `k`, its default, or what it says."""
        if self.checkpoint is not None:
            options = ServeOptions(self.checkpoint, num_speculative_tokens=k)
            return command.num_speculative_tokens(options, find_vllm().platform)
        if k is not None:
            raise typer.BadParameter("--k needs --checkpoint: a running server drafts as it does")
        with self.client() as client:
            counters = client.spec_decode_counters()
        return counters.k if counters else 0

    def identity(self, k: int | None = None) -> Result:
        """Return what tells this server from another; of ours `serve`, a command that serves so."""
        from mtp_graft.checkpoint.manifest import fingerprints
        from mtp_graft.checkpoint.shards import INDEX_NAME, read_weight_map
        from mtp_graft.stages.parallel import device_name

        if self.checkpoint is None:
            return {"base_url": self.base_url}
        ranks, length = self.tensor_parallel_size, self.max_model_len
        flags: Result = {"--profile": self.profile, "--tensor-parallel-size": ranks}
        flags |= {"--max-model-len": length, "-k": k, "--": self.extra or None}
        shards = sorted(set(read_weight_map(self.checkpoint / INDEX_NAME).values()))
        words = ["mtp-graft", "serve", self.checkpoint.name, *command.as_words(flags)]
        return {
            "serve": shlex.join(words),
            "files": fingerprints([self.checkpoint / name for name in ("config.json", *shards)]),
            "device": device_name(),
            "vllm": "{0.version} ({0.platform})".format(find_vllm()),
        }

    def finish(self, benchmark: str, claim: Result, measure: Callable[[Path], Result]) -> Result:
        """Measure and return the result; keep it in the run folder, if there is one.

        `claim` decides what is measured, `k` included; GraftError for a folder of another one.
        `measure` gets a folder for what can be used again.
        """
        if self.run is None:
            with tempfile.TemporaryDirectory() as folder_name:
                return measure(Path(folder_name))
        from mtp_graft.checkpoint import manifest
        from mtp_graft.checkpoint.files import write_json

        manifest.expect_this_version(self.run)
        name = benchmark if self.profile == NO_PROFILE else f"{benchmark}-{self.profile}"
        folder, began = self.run / "bench" / name, time.perf_counter()
        claim = claim | {"server": self.identity(claim.get("k"))}
        manifest.claim_folder(folder, claim)
        result = measure(folder)
        if result != manifest.finished_result(folder, "result.json"):
            write_json(result, folder / "result.json")
            # A running server's device is not known here.
            device = claim["server"].get("device", f"server at {self.base_url}")
            took = time.perf_counter() - began
            manifest.write_manifest(folder, f"bench {name}", claim, (), device, took)
        return result

    @contextmanager
    def client(
        self,
        report: Report = lambda *_: None,
        name: str = "",
        k: int | None = None,
        prefix_caching: bool = False,  # off: a prompt that comes again is computed again
        **drafts: Any,  # more of `ServeOptions`
    ) -> Iterator["ServerClient"]:
        """Give a client of the server; one of ours drafts `k`, and `name` is its log's."""
        from mtp_graft.serving.client import ServerClient
        from mtp_graft.serving.plan import make_plan
        from mtp_graft.serving.topology import hardware_for

        if self.checkpoint is None:
            with ServerClient(str(self.base_url), self.api_key) as client:
                yield client
            return
        options = ServeOptions(
            self.checkpoint,
            port=0,
            tensor_parallel_size=self.tensor_parallel_size,
            max_model_len=self.max_model_len,
            num_speculative_tokens=k,
            prefix_caching=prefix_caching,
            api_key=self.api_key,
            extra_args=self.extra,
            **drafts,
        )
        if self.profile != NO_PROFILE:
            plan = make_plan(options, str(self.profile), hardware_for(find_vllm().platform))
            for text in plan.notes:
                note(f"plan: {text}")
            options = plan.options
        with started(options, report, name, self.log) as client:
            yield client
