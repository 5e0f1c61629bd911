"""`mtp-graft serve`."""

import tempfile
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_graft.cli.app import NO_PROFILE, JsonOption, app
from mtp_graft.cli.grouped import grouped
from mtp_graft.cli.help import SERVE, SectionedCommand
from mtp_graft.cli.output import is_stdout, note, progress_bar, write_json
from mtp_graft.cli.serve_options import HardwareOptions, ServerFlags

if TYPE_CHECKING:
    from mtp_graft.serving.command import InstalledVllm, ServeOptions
    from mtp_graft.serving.plan import Plan


@app.command(cls=SectionedCommand, rich_help_panel=SERVE)
@grouped
def serve(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A DeepSeek-V4 checkpoint folder.")
    ],
    server: ServerFlags,
    hardware: HardwareOptions,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="128k, 256k, 256k-2, 524k, 640k, 1m; auto: the longest context that fits; none: "
            "vLLM's own defaults. Other options replace its values. Default: auto on GPUs, none "
            "on a CPU.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Start, test that the head drafts well, stop; 1 if not."),
    ] = False,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --check: the server's output.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command only.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Serve a checkpoint with vLLM in the foreground, drafting with its head if it has one."""
    from mtp_graft.serving.command import is_loopback

    if server.api_key == "":
        raise typer.BadParameter("is empty: vLLM would ask nobody for it", param_hint="--api-key")
    _check_usage(profile, hardware, check, log, dry_run, json_file)
    if not is_loopback(server.host) and server.api_key is None:
        note(f"warning: {server.host} is not loopback and there is no --api-key: anyone may use it")
    options, vllm = server.options(checkpoint), hardware.find_vllm(dry_run)
    plan = _plan(options, profile, vllm, hardware)
    if plan is not None:
        options = plan.options
    if dry_run:
        _print_command(options, vllm, plan, json_file)
    elif check:
        _check(options, log, json_file)
    else:
        _serve(options, vllm, plan)


def _check_usage(
    profile: str | None,
    hardware: HardwareOptions,
    check: bool,
    log: Path | None,
    dry_run: bool,
    json_file: Path | None,
) -> None:
    """Refuse options that do not go together."""
    if dry_run and check:
        raise typer.BadParameter("give one of --dry-run and --check")
    if json_file is not None and not (dry_run or check):
        raise typer.BadParameter(
            "needs --dry-run or --check: a server has no result", param_hint="--json"
        )
    if log is not None and not check:
        raise typer.BadParameter("needs --check", param_hint="--log")
    if profile == NO_PROFILE and hardware.are_given:
        raise typer.BadParameter("options for hardware need a --profile to fit to it")
    if hardware.count is not None and hardware.gpu is None:
        raise typer.BadParameter("needs --gpu", param_hint="--count")


def _plan(
    options: "ServeOptions",
    profile: str | None,
    vllm: "InstalledVllm",
    hardware: HardwareOptions,
) -> "Plan | None":
    """Return the profile fitted to the hardware, None for vLLM's own defaults."""
    from mtp_graft.serving.plan import AUTO, make_plan

    if profile == NO_PROFILE:
        return None
    if profile is not None:
        return make_plan(options, profile, hardware.find(vllm), vllm, hardware.node)
    if vllm.platform == "cpu" and not hardware.are_given:
        return None
    plan = make_plan(options, AUTO, hardware.find(vllm), vllm, hardware.node)
    why = f"no --profile given: {AUTO}, which took {plan.profile}; {NO_PROFILE} leaves all to vLLM"
    return replace(plan, notes=(why, *plan.notes))


def _print_command(
    options: "ServeOptions", vllm: "InstalledVllm", plan: "Plan | None", json_file: Path | None
) -> None:
    from mtp_graft.serving.command import build_command

    command = build_command(options, vllm)
    notes = _notes(options, vllm, plan)
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


def _notes(options: "ServeOptions", vllm: "InstalledVllm", plan: "Plan | None") -> tuple[str, ...]:
    """Return what was decided and why; without a plan, at least what is drafted."""
    from mtp_graft.serving.plan import explain_drafting

    return tuple(explain_drafting(options, vllm.platform)) if plan is None else plan.notes


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
    from mtp_graft.serving.check import MIN_ACCEPTANCE, check_drafter, require_drafts
    from mtp_graft.serving.server import managed_server

    require_drafts(options)
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


def _serve(options: "ServeOptions", vllm: "InstalledVllm", plan: "Plan | None") -> None:
    """Run vLLM in the foreground and leave with its exit status."""
    from mtp_graft.errors import GraftError
    from mtp_graft.serving.server import serve_foreground
    from mtp_graft.serving.service_manager import notify

    def on_ready(where: str) -> None:
        note(f"ready: {where}")
        try:
            notify("READY=1")
        except GraftError as error:  # a healthy server is worth more than who started it
            note(f"warning: {error}")

    hardware = () if plan is None else (f"{plan.hardware}",)
    for text in (*hardware, *_notes(options, vllm, plan)):
        note(f"plan: {text}")
    raise typer.Exit(serve_foreground(options, on_ready))
