"""The options of `mtp-graft serve`: the server's, and those of hardware to fit a profile to."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtp_graft.cli.app import (
    DraftLmHeadOption,
    DraftSampleOption,
    MaxModelLenOption,
    ServeArgument,
    SpeculativeOption,
    TensorParallelOption,
    flag_of,
)
from mtp_graft.cli.help import HARDWARE, SERVER
from mtp_graft.errors import GraftError

if TYPE_CHECKING:  # the imports of a command load torch: `--help` need not wait for it
    from mtp_graft.serving.command import InstalledVllm, Platform, ServeOptions
    from mtp_graft.serving.plan import Node
    from mtp_graft.serving.topology import Hardware


def _server(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=SERVER, **settings)


def _hardware(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=HARDWARE, **settings)


#: Flags of vLLM that an option here stands for under another name.
_OTHER_NAMES = {
    "-tp": "--tensor-parallel-size",
    "--model": "CHECKPOINT",
    "--kv-cache-memory-bytes": "--kv-cache-gib",
    "--enable-prefix-caching": "--prefix-caching",
    "--no-enable-prefix-caching": "--no-prefix-caching",
    "--no-enforce-eager": "--no-enforce-eager",
}


@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """What the server is told; the fields are those of ServeOptions."""

    host: Annotated[str, _server(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, _server(min=0, max=65535, metavar="N", help="0 picks a free one.")] = 8000
    tensor_parallel_size: TensorParallelOption = None
    max_model_len: MaxModelLenOption = None
    max_num_seqs: Annotated[int | None, _server(min=1, metavar="N", help="Requests at once.")] = (
        None
    )
    max_num_batched_tokens: Annotated[
        int | None, _server(min=1, metavar="N", help="Tokens of all requests in one step.")
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        _server(min=0.01, max=1.0, metavar="SHARE", help="Share of a GPU's memory to use."),
    ] = None
    num_speculative_tokens: SpeculativeOption = None
    draft_lm_head_quantization: DraftLmHeadOption = None
    draft_sample_method: DraftSampleOption = None
    served_model_name: Annotated[
        list[str] | None, _server(metavar="NAME", help="Name in the API; may be repeated.")
    ] = None
    kv_cache_dtype: Annotated[str, _server(metavar="TYPE", help="As vLLM names it.")] = "fp8"
    kv_cache_gib: Annotated[
        float | None,
        _server(min=0.01, metavar="GIB", help="KV cache per rank. Default: 1 on a CPU."),
    ] = None
    prefix_caching: Annotated[bool, _server(help="Reuse shared prompt prefixes.")] = True
    enforce_eager: Annotated[
        bool | None, _server(help="Do not compile. Default: eager on a CPU.")
    ] = None
    api_key: Annotated[
        str | None,
        _server(envvar="VLLM_API_KEY", metavar="KEY", help="Key that /v1 requests must show."),
    ] = None
    extra: ServeArgument = None

    def __post_init__(self) -> None:
        """Refuse flags after -- that have an option here, which vLLM would take unplanned.

        And empty words: an address that is none would be every one.
        """
        for flag, words in (
            ("--host", [self.host]),
            ("--served-model-name", self.served_model_name),
        ):
            if "" in (words or ()):
                raise typer.BadParameter("is empty", param_hint=flag)
        names = (f"--{field.name.replace('_', '-')}" for field in fields(self))
        own = {name: name for name in names} | _OTHER_NAMES
        for flag in map(flag_of, self.extra or ()):
            if flag in own:
                raise typer.BadParameter(f"{flag} after --: give {own[flag]} before it")

    def options(self, checkpoint: Path) -> "ServeOptions":
        """Return what to serve and how."""
        from mtp_graft.serving.command import ServeOptions

        given = {field.name: getattr(self, field.name) for field in fields(self)}
        names, extra = given.pop("served_model_name"), given.pop("extra")
        return ServeOptions(
            checkpoint,
            served_model_names=tuple(names or ()),
            extra_args=tuple(extra or ()),
            **given,
        )


@dataclass(frozen=True, kw_only=True)
class HardwareOptions:
    """The hardware to fit a profile to, where it is not what is found here."""

    gpu: Annotated[
        str | None,
        _hardware(
            metavar="NAME", help="Fit the profile to this GPU, or cpu, not to what is found."
        ),
    ] = None
    count: Annotated[
        int | None, _hardware(min=1, metavar="N", help="How many of --gpu. Default: 1.")
    ] = None
    nnodes: Annotated[
        int | None, _hardware(min=1, metavar="N", help="Machines that serve together.")
    ] = None
    node_rank: Annotated[
        int | None, _hardware(min=0, metavar="N", help="This machine's number. Default: 0.")
    ] = None
    master_addr: Annotated[
        str | None, _hardware(metavar="ADDRESS", help="Address of machine 0, for the others.")
    ] = None

    @property
    def are_given(self) -> bool:
        """Return whether there is any."""
        return any(getattr(self, field.name) is not None for field in fields(self))

    @property
    def node(self) -> "Node":
        """Return this machine's place among several."""
        from mtp_graft.serving.plan import Node

        return Node(self.node_rank or 0, self.master_addr)

    def find_vllm(self, dry_run: bool) -> "InstalledVllm":
        """Return the vLLM to plan for; with `dry_run`, --gpu need not be this machine's."""
        from mtp_graft.serving.command import find_vllm, installed_vllm, vllm_elsewhere
        from mtp_graft.serving.topology import names_cpu

        if dry_run and self.gpu is not None:
            platform: Platform = "cpu" if names_cpu(self.gpu) else "cuda"
            installed = installed_vllm()
            if installed is None or installed.platform != platform:
                return vllm_elsewhere(platform)
        return find_vllm()

    def find(self, vllm: "InstalledVllm") -> "Hardware":
        """Return the hardware that is named or, without a name, found."""
        from mtp_graft.serving.topology import CPU, find_gpus, named_gpus, names_cpu

        if vllm.platform == "cpu":
            if (self.gpu is not None and not names_cpu(self.gpu)) or self.nnodes is not None:
                raise GraftError(
                    f"vLLM {vllm.version} is installed, a CPU build; expected one for CUDA with "
                    "--gpu or --nnodes (--dry-run --gpu prints for hardware that is elsewhere)"
                )
            return CPU
        if names_cpu(self.gpu):
            raise GraftError(
                f"--gpu cpu: vLLM {vllm.version} here is a CUDA build; expected a CPU build"
            )
        if self.gpu is not None:
            return named_gpus(self.gpu, self.count or 1, self.nnodes)
        return find_gpus(self.nnodes or 1)
