"""`mtp-graft serve`."""

import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_graft.cli.app import JsonOption, SpeculativeOption, app
from mtp_graft.cli.help import HARDWARE, SERVE, SectionedCommand
from mtp_graft.cli.output import is_stdout, note, progress_bar, write_json

if TYPE_CHECKING:
    from mtp_graft.serving.command import InstalledVllm, ServeOptions
    from mtp_graft.serving.plan import Plan


@app.command(cls=SectionedCommand, rich_help_panel=SERVE)
def serve(
    checkpoint: Annotated[Path, typer.Argument(help="A DeepSeek-V4 checkpoint folder.")],
    extra: Annotated[
        list[str] | None, typer.Argument(help="After --: arguments for vllm serve, as they are.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="128k, 256k, 256k-2, 524k, 640k, 1m, or auto: the longest context that fits. "
            "Other options replace its values."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    tp: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel-size",
            "--tp",
            min=1,
            help="Ranks to shard over. Default: 1; with a profile, as many GPUs as can be used.",
        ),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest sequence.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of all requests in one step.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Share of a GPU's memory to use.")
    ] = None,
    num_speculative_tokens: SpeculativeOption = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name in the API.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="As vLLM names it.")] = "fp8",
    kv_cache_gib: Annotated[
        float | None, typer.Option(min=0.01, help="KV cache per rank. Default: 1 on a CPU.")
    ] = None,
    prefix_caching: Annotated[bool, typer.Option(help="Reuse shared prompt prefixes.")] = True,
    enforce_eager: Annotated[
        bool | None, typer.Option(help="Do not compile. Default: eager on a CPU.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", help="Key that /v1 requests must show.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Fit the profile to this GPU, not to those found.", rich_help_panel=HARDWARE
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="How many of --gpu. Default: 1.", rich_help_panel=HARDWARE),
    ] = None,
    vllm_version: Annotated[
        str | None,
        typer.Option("--vllm", help="With --dry-run: for this vLLM.", rich_help_panel=HARDWARE),
    ] = None,
    nnodes: Annotated[
        int | None,
        typer.Option(min=1, help="Machines that serve together.", rich_help_panel=HARDWARE),
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(min=0, help="This machine's number. Default: 0.", rich_help_panel=HARDWARE),
    ] = None,
    master_addr: Annotated[
        str | None,
        typer.Option(help="Address of machine 0, for the others.", rich_help_panel=HARDWARE),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Start, test that the head drafts well, stop; 1 if not."),
    ] = False,
    log: Annotated[Path | None, typer.Option(help="With --check: the server's output.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command only.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Serve a checkpoint with vLLM in the foreground, drafting with its head if it has one."""
    from mtp_graft.serving.command import LOOPBACK_HOSTS, ServeOptions

    if dry_run and check:
        raise typer.BadParameter("give one of --dry-run and --check")
    if json_file is not None and not (dry_run or check):
        raise typer.BadParameter(
            "needs --dry-run or --check: a server has no result", param_hint="--json"
        )
    elsewhere = (gpu, count, vllm_version, nnodes, node_rank, master_addr)
    if profile is None and any(value is not None for value in elsewhere):
        raise typer.BadParameter("options for hardware need a --profile to fit to it")
    if count is not None and gpu is None:
        raise typer.BadParameter("needs --gpu", param_hint="--count")
    if vllm_version is not None and not (dry_run and gpu):
        raise typer.BadParameter("needs --dry-run and --gpu", param_hint="--vllm")
    if log is not None and not check:
        raise typer.BadParameter("needs --check", param_hint="--log")
    options = ServeOptions(
        checkpoint,
        host=host,
        port=port,
        tensor_parallel_size=tp,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        num_speculative_tokens=num_speculative_tokens,
        served_model_names=tuple(served_model_name or ()),
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_gib=kv_cache_gib,
        prefix_caching=prefix_caching,
        enforce_eager=enforce_eager,
        api_key=api_key,
        extra_args=tuple(extra or ()),
    )
    if host not in LOOPBACK_HOSTS and api_key is None:
        note(f"warning: {host} is not loopback and there is no --api-key: anyone may use it")
    vllm = _vllm(vllm_version, gpu if dry_run else None)
    plan = None
    if profile is not None:
        plan = _plan(
            *(options, profile, vllm, gpu, count or 1, nnodes, node_rank or 0, master_addr)
        )
        options = plan.options
    if dry_run:
        _print_command(options, vllm, plan, json_file)
    elif check:
        _check(options, log, json_file)
    else:
        _serve(options, plan)


def _vllm(version: str | None, gpu: str | None) -> "InstalledVllm":
    """Return the vLLM to plan for; a GPU that is named need not be this machine's."""
    from mtp_graft.serving.command import find_vllm, vllm_elsewhere

    if gpu is None:
        return find_vllm()
    if version is None:
        installed = find_vllm()
        return (
            installed if installed.platform == "cuda" else vllm_elsewhere(installed.version.public)
        )
    return vllm_elsewhere(version)


def _plan(
    options: "ServeOptions",
    profile: str,
    vllm: "InstalledVllm",
    gpu: str | None,
    count: int,
    nnodes: int | None,
    node_rank: int,
    master_addr: str | None,
) -> "Plan":
    from mtp_graft.errors import GraftError
    from mtp_graft.serving.plan import Node, make_plan
    from mtp_graft.serving.topology import CPU, find_gpus, named_gpus

    if vllm.platform == "cpu":
        if gpu is not None or nnodes is not None:
            raise GraftError(
                f"vLLM {vllm.version} is installed, a CPU build; expected one for CUDA with --gpu "
                "or --nnodes (--dry-run --gpu prints for hardware that is elsewhere)"
            )
        hardware = CPU
    elif gpu is not None:
        hardware = named_gpus(gpu, count, nnodes)
    else:
        hardware = find_gpus(nnodes or 1)
    return make_plan(options, profile, hardware, vllm, Node(node_rank, master_addr))


def _print_command(
    options: "ServeOptions", vllm: "InstalledVllm", plan: "Plan | None", json_file: Path | None
) -> None:
    from mtp_graft.serving.command import build_command

    command = build_command(options, vllm)
    notes = () if plan is None else plan.notes
    result = {
        "env": command.printable_env(),
        "argv": list(command.argv),
        "notes": list(notes),
        "profile": None if plan is None else plan.profile,
        "hardware": None if plan is None else str(plan.hardware),
    }
    write_json(result, json_file)
    if is_stdout(json_file):
        return
    if plan is not None:
        print(f"# {plan.hardware}; vLLM {vllm.version}")
    for line in _comments(notes):
        print(line)
    print(command.as_shell())


def _comments(notes: Iterable[str]) -> Iterable[str]:
    for text in notes:
        yield from textwrap.wrap(
            text,
            width=96,
            initial_indent="# - ",
            subsequent_indent="#   ",
            break_on_hyphens=False,
            break_long_words=False,
        )


def _check(options: "ServeOptions", log: Path | None, json_file: Path | None) -> None:
    """Start the server, test its head, stop it; a head that is not alive is an error."""
    from mtp_graft.errors import GraftError
    from mtp_graft.serving.check import MIN_ACCEPTANCE, check_drafter, require_context
    from mtp_graft.serving.server import managed_server

    require_context(options)
    log = log or Path(tempfile.mkdtemp(prefix="mtp-graft-")) / "vllm.log"
    note(f"server log: {log}")
    with progress_bar() as report:
        start = managed_server(
            options, log, on_start=lambda s, _line: report(f"starting vLLM, {s:.0f} s", 0, 0)
        )
        with start as client:
            found = check_drafter(client)
    result = {
        "ok": found.is_alive,
        "acceptance": found.acceptance,
        "num_draft_tokens": found.num_draft_tokens,
        "threshold": MIN_ACCEPTANCE,
    }
    write_json(result, json_file)
    if not found.is_alive:
        raise GraftError(
            f"{options.checkpoint}: of {found.num_draft_tokens} tokens drafted on a repeated "
            f"sentence the model accepted {found.acceptance:.1%}, expected at least "
            f"{MIN_ACCEPTANCE:.0%}: the head is not the model's; run mtp-graft doctor on it"
        )
    if not is_stdout(json_file):
        print(f"accepted {found.acceptance:.1%} of {found.num_draft_tokens} drafted tokens")


def _serve(options: "ServeOptions", plan: "Plan | None") -> None:
    """Run vLLM in the foreground and leave with its exit status."""
    from mtp_graft.serving.server import serve_foreground
    from mtp_graft.serving.service_manager import notify

    def on_ready(where: str) -> None:
        note(f"ready: {where}")
        notify("READY=1")

    if plan is not None:
        for text in (f"{plan.hardware}", *plan.notes):
            note(f"plan: {text}")
    raise typer.Exit(serve_foreground(options, on_ready))
