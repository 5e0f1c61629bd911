"""`mtp-graft serve`."""

import tempfile
import textwrap
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtp_graft.cli.app import NO_PROFILE, JsonOption, app, flag_of, refuse_address
from mtp_graft.cli.grouped import grouped
from mtp_graft.cli.help import HARDWARE, SERVE, SectionedCommand
from mtp_graft.cli.output import is_stdout, note, progress_bar, write_json
from mtp_graft.errors import GraftError
from mtp_graft.serving.command import (
    InstalledVllm,
    ServeOptions,
    build_command,
    find_vllm,
    installed_vllm,
    num_speculative_tokens,
    vllm_elsewhere,
)

if TYPE_CHECKING:  # these load torch, which `--help` need not wait for
    from mtp_graft.serving.plan import Plan
    from mtp_graft.serving.topology import Hardware

#: Flags of vLLM that an option here stands for under another name.
_OTHER_NAMES = {
    "-tp": "--tensor-parallel-size",
    "--model": "CHECKPOINT",
    "--served-model-name": "--served-model-name",
    "--kv-cache-memory-bytes": "--kv-cache-gib",
    "--enable-prefix-caching": "--prefix-caching",
    "--no-enable-prefix-caching": "--no-prefix-caching",
    "--no-enforce-eager": "--no-enforce-eager",
}
#: How --dry-run prints a reason.
_COMMENT = textwrap.TextWrapper(
    *(96, "# - ", "#   "), break_on_hyphens=False, break_long_words=False
)


def _hardware(**settings: Any) -> Any:
    return typer.Option(rich_help_panel=HARDWARE, **settings)


@dataclass(frozen=True, kw_only=True)
class HardwareOptions:
    """The hardware to fit a profile to, where it is not what is found here."""

    gpu: Annotated[
        str | None, _hardware(metavar="NAME", help="Fit the profile to this GPU, or cpu.")
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

    def find_vllm(self, dry_run: bool) -> InstalledVllm:
        """Return the vLLM to plan for; with `dry_run`, --gpu need not be this machine's."""
        from mtp_graft.serving.topology import named_hardware

        if dry_run and self.gpu is not None:
            here = installed_vllm()
            elsewhere = vllm_elsewhere(named_hardware(self.gpu).platform)
            if here is None or here.platform != elsewhere.platform:
                return elsewhere
        return find_vllm()

    def find(self, vllm: InstalledVllm) -> "Hardware":
        """Return the hardware that is named or, without a name, found."""
        from mtp_graft.serving.topology import CPU, find_gpus, named_hardware

        on_cpu = vllm.platform == "cpu"
        named = named_hardware(self.gpu, self.count or 1, self.nnodes) if self.gpu else None
        is_other = named is not None and named.platform != vllm.platform
        if is_other or (on_cpu and self.nnodes is not None):
            raise GraftError(
                f"vLLM {vllm.version} is {'a CPU' if on_cpu else 'a CUDA'} build, which --gpu or "
                "--nnodes does not fit (--dry-run --gpu prints for hardware that is elsewhere)"
            )
        return named or (CPU if on_cpu else find_gpus(self.nnodes or 1))


@app.command(cls=SectionedCommand, rich_help_panel=SERVE)
@grouped
def serve(
    server: ServeOptions,
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
    _check_usage(server, profile, hardware, check, log, dry_run, json_file)
    vllm = hardware.find_vllm(dry_run)
    plan = _plan(server, profile, vllm, hardware)
    options = server if plan is None else plan.options
    if dry_run:
        _print_command(options, vllm, plan, json_file)
    elif check:
        _check(options, log, json_file)
    else:
        _serve(options, plan)


def _check_usage(
    server: ServeOptions,
    profile: str | None,
    hardware: HardwareOptions,
    check: bool,
    log: Path | None,
    dry_run: bool,
    json_file: Path | None,
) -> None:
    """Refuse options that do not go together; warn of a server that is open to anyone."""
    rules = (
        (dry_run and check, "give one of --dry-run and --check"),
        (json_file and not (dry_run or check), "--json needs --dry-run or --check"),
        (log and not check, "--log needs --check"),
        (profile == NO_PROFILE and hardware.are_given, "options for hardware need a --profile"),
        (hardware.count and not hardware.gpu, "--count needs --gpu"),
    )
    for is_broken, rule in rules:
        if is_broken:
            raise typer.BadParameter(rule)
    refuse_address([*server.extra_args])
    # vLLM would take these unplanned.
    own = {f"--{field.name}".replace("_", "-"): None for field in fields(server)}
    for flag in map(flag_of, server.extra_args):
        if flag in own or flag in _OTHER_NAMES:
            raise typer.BadParameter(
                f"{flag} after --: give {_OTHER_NAMES.get(flag, flag)} before it"
            )
    is_loopback = server.host.startswith("127.") or server.host in ("::1", "localhost")
    if server.api_key is None and not is_loopback:
        note(f"warning: {server.host} is not loopback and there is no --api-key: anyone may use it")


def _plan(
    options: ServeOptions, profile: str | None, vllm: InstalledVllm, hardware: HardwareOptions
) -> "Plan | None":
    """Return the profile fitted to the hardware, None for vLLM's own defaults."""
    from mtp_graft.serving.plan import AUTO, make_plan

    by_default = profile is None and (vllm.platform == "cuda" or hardware.are_given)
    if profile == NO_PROFILE or (profile is None and not by_default):
        return None
    nodes = (hardware.node_rank or 0, hardware.master_addr)
    plan = make_plan(options, profile or AUTO, hardware.find(vllm), *nodes)
    if not by_default:
        return plan
    why = f"no --profile given: {AUTO}, which took {plan.profile}; {NO_PROFILE} leaves all to vLLM"
    return replace(plan, notes=(why, *plan.notes))


def _print_command(
    options: ServeOptions, vllm: InstalledVllm, plan: "Plan | None", json_file: Path | None
) -> None:
    command = build_command(options, vllm)
    notes = [*(plan.notes if plan else ()), *command.reasons()]
    result = {
        "env": command.printable_env(),
        "argv": list(command.argv),
        "notes": notes,
        "profile": plan and plan.profile,
        "hardware": plan and str(plan.hardware),
    }
    write_json(result, json_file)
    if is_stdout(json_file):
        return
    if plan is not None:
        print(f"# {plan.hardware}; vLLM {vllm.version}")
    for text in notes:
        print(_COMMENT.fill(text))
    print(command.as_shell())


def _check(options: ServeOptions, log: Path | None, json_file: Path | None) -> None:
    """Start the server, test its head, stop it; a head that is not alive is an error."""
    from mtp_graft.serving.server import MIN_ACCEPTANCE, check_drafter, managed_server

    if num_speculative_tokens(options, find_vllm().platform) == 0:
        raise GraftError(
            f"{options.checkpoint}: --check without drafts; expected a checkpoint with a head and "
            "at least one speculative token"
        )
    log = log or Path(tempfile.mkdtemp(prefix="mtp-graft-")) / "vllm.log"
    note(f"server log: {log}")
    with progress_bar() as report:
        start = managed_server(
            options, log, on_start=lambda s: report(f"starting vLLM, {s:.0f} s", 0, 0)
        )
        with start as client:
            found = check_drafter(client)
    acceptance = found.acceptance or 0.0
    is_alive = acceptance >= MIN_ACCEPTANCE
    result = {
        "ok": is_alive,
        "acceptance": acceptance,
        "num_draft_tokens": found.num_draft_tokens,
        "threshold": MIN_ACCEPTANCE,
    }
    write_json(result, json_file)
    if not is_alive:
        raise GraftError(
            f"{options.checkpoint}: of {found.num_draft_tokens} tokens drafted on a repeated "
            f"sentence the model accepted {acceptance:.1%}, expected at least "
            f"{MIN_ACCEPTANCE:.0%}: the head is not the model's; run mtp-graft doctor on it"
        )
    if not is_stdout(json_file):
        print(f"accepted {acceptance:.1%} of {found.num_draft_tokens} drafted tokens")


def _serve(options: ServeOptions, plan: "Plan | None") -> None:
    """Run vLLM in the foreground and leave with its exit status."""
    from mtp_graft.serving.server import serve_foreground

    for text in (f"{plan.hardware}", *plan.notes) if plan else ():
        note(f"plan: {text}")
    raise typer.Exit(serve_foreground(options, lambda where: note(f"ready: {where}")))
