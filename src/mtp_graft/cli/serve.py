"""`mtp-graft serve` and `doctor`."""

import sys
import textwrap
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from packaging.version import Version

from mtp_graft.bench.page import counted
from mtp_graft.cli.app import DRY_RUN, JSON_FILE, NO_PROFILE, app, refuse, with_options
from mtp_graft.cli.output import note, progress_bar, show
from mtp_graft.cli.target import LOG, started
from mtp_graft.errors import GraftError
from mtp_graft.serving import command
from mtp_graft.serving.command import InstalledVllm, ServeOptions, argument, option

if TYPE_CHECKING:  # these load torch, which `--help` need not wait for
    from mtp_graft.serving.doctor.findings import Finding
    from mtp_graft.serving.plan import Plan

#: Flags of vLLM that an option here stands for, besides those of the same name.
_OTHER_NAMES = {
    *("-tp", "--model", "--served-model-name", "--kv-cache-memory-bytes", "--no-enforce-eager"),
    *("--enable-prefix-caching", "--no-enable-prefix-caching"),
}
#: How --dry-run prints a reason.
_COMMENT = textwrap.TextWrapper(96, "# - ", "#   ", break_on_hyphens=False, break_long_words=False)
_VLLM_VERSION = option(
    None, "VERSION", "Judge for this vLLM.", "--vllm", parser=lambda given: f"{Version(given)}"
)
_PROFILES = (
    "128k, 256k, 256k-2, 524k, 640k, 1m; auto: the longest context that fits; none: vLLM's own "
    "defaults. Other options replace its values. Default: auto on GPUs, none on a CPU."
)


@command.option_group
class HardwareOptions:
    """The hardware to fit a profile to, where it is not what is found here."""

    gpu: str | None = option(None, "NAME", "Fit the profile to this GPU, or cpu.")
    count: int | None = option(None, "N", "How many of --gpu. Default: 1.", min=1)
    nnodes: int | None = option(None, "N", "Machines that serve together.", min=1)
    node_rank: int = option(0, "N", "This machine's number.", min=0)
    master_addr: str | None = option(None, "ADDRESS", "Address of machine 0, for the others.")


@app.command()
@with_options
def serve(
    server: ServeOptions,
    asked: HardwareOptions,
    profile: str | None = option(None, "NAME", _PROFILES),
    check: bool = option(False, None, "Start, test the head, stop; 1 if it fails.", "--check"),
    dry_run: bool = DRY_RUN,
    version: str | None = _VLLM_VERSION,
    log: Path | None = LOG,
    json_file: Path | None = JSON_FILE,
) -> None:
    """Serve a checkpoint with vLLM, drafting with its head: --k, or as `mtp-graft tune` found."""
    from mtp_graft.serving.plan import with_tuned
    from mtp_graft.stages.parallel import device_name

    rules = {
        "give one of --dry-run and --check": not (dry_run and check),
        "--json needs --dry-run or --check": not json_file or dry_run or check,
        "hardware options need a profile": profile != NO_PROFILE or asked == HardwareOptions(),
        "--count needs --gpu": not asked.count or asked.gpu,
        "--vllm needs --dry-run": not version or dry_run,
        "--log needs --check": not log or check,
    }
    if broken := next((rule for rule, holds in rules.items() if not holds), None):
        raise typer.BadParameter(broken)
    own = {f"--{field.name}".replace("_", "-") for field in fields(server)}
    refuse(server.extra_args, own | _OTHER_NAMES)  # vLLM would take these
    is_loopback = server.host.startswith("127.") or server.host in ("::1", "localhost")
    if server.api_key is None and not is_loopback:
        note(f"warning: {server.host} is not loopback and there is no --api-key: anyone may use it")
    vllm, plan = _plan(server, profile, asked, version, dry_run)
    options = server if plan is None else plan.options
    if not check:
        device = f"{asked.count or 1}x NVIDIA {asked.gpu}" if asked.gpu else device_name()
        options = with_tuned(options, device, vllm)
    if dry_run:
        _print_command(options, vllm, plan, json_file)
    elif check:
        _check(options, vllm, log, json_file)
    else:
        from mtp_graft.serving.server import serve_foreground

        for text in (*((f"{plan.hardware}", *plan.notes) if plan else ()), *options.why):
            note(f"plan: {text}")
        raise typer.Exit(serve_foreground(options, lambda where: note(f"ready: {where}")))


def _plan(
    options: ServeOptions,
    profile: str | None,
    asked: HardwareOptions,
    version: str | None,
    dry_run: bool,
) -> "tuple[InstalledVllm, Plan | None]":
    """Return the vLLM to serve with, and the profile fitted to the hardware; None: vLLM's own."""
    from mtp_graft.serving.plan import AUTO, make_plan
    from mtp_graft.serving.topology import CPU, find_gpus, named_hardware

    named = named_hardware(asked.gpu, asked.count or 1, asked.nnodes) if asked.gpu else None
    here = command.installed_vllm()
    of = named or here
    if version or (dry_run and named and (here is None or here.platform != named.platform)):
        vllm = command.vllm_elsewhere(of.platform if of else "cuda", version)
    else:
        vllm = command.find_vllm()
    on_cpu = vllm.platform == "cpu"
    if profile == NO_PROFILE or (profile is None and on_cpu and asked == HardwareOptions()):
        return vllm, None
    if (named and named.platform != vllm.platform) or (on_cpu and asked.nnodes is not None):
        build = f"vLLM {vllm.version} is {'a CPU' if on_cpu else 'a CUDA'} build"
        cure = "with --dry-run, --gpu prints for hardware that is elsewhere"
        raise GraftError(f"{build}, which --gpu or --nnodes does not fit; {cure}")
    found = named or (CPU if on_cpu else find_gpus(asked.nnodes or 1))
    plan = make_plan(options, profile or AUTO, found, asked.node_rank, asked.master_addr)
    if profile is None:
        why = f"no --profile given: {AUTO}, which took {plan.profile}"
        plan = replace(plan, notes=(f"{why}; {NO_PROFILE} leaves all to vLLM", *plan.notes))
    return vllm, plan


def _print_command(
    options: ServeOptions, vllm: InstalledVllm, plan: "Plan | None", json_file: Path | None
) -> None:
    built = command.build_command(options, vllm)
    notes = [*(plan.notes if plan else ()), *built.reasons()]
    result = {
        "env": built.printable_env(),
        "argv": list(built.argv),
        "notes": notes,
        "profile": plan and plan.profile,
        "hardware": plan and str(plan.hardware),
    }
    about = [f"# {plan.hardware}; vLLM {vllm.version}"] if plan else []
    show(result, json_file, *about, *map(_COMMENT.fill, notes), built.as_shell())


def _check(
    options: ServeOptions, vllm: InstalledVllm, log: Path | None, json_file: Path | None
) -> None:
    """Start the server, test its head, stop it; a head that is not alive is an error."""
    from mtp_graft.serving.server import MIN_ACCEPTANCE, check_drafter

    if command.num_speculative_tokens(options, vllm.platform) == 0:
        expected = "expected a checkpoint with a head and at least one speculative token"
        raise GraftError(f"{options.checkpoint}: --check without drafts; {expected}")
    with progress_bar() as report, started(options, report, "check", log) as client:
        found = check_drafter(client)
    acceptance, drafted = found.acceptance or 0.0, found.num_draft_tokens
    result = {"ok": acceptance >= MIN_ACCEPTANCE, "acceptance": acceptance}
    result |= {"num_draft_tokens": drafted, "threshold": MIN_ACCEPTANCE}
    said = f"accepted {acceptance:.1%} of {drafted} drafted tokens"
    show(result, json_file, said)
    if not result["ok"]:
        expected = f"{said}, of a repeated sentence, expected at least {MIN_ACCEPTANCE:.0%}"
        cure = "the head is not the model's; run mtp-graft doctor on it"
        raise GraftError(f"{options.checkpoint}: {expected}: {cure}")


@app.command()
def doctor(
    checkpoint: Path = argument("CHECKPOINT", "A DeepSeek-V4 checkpoint folder."),
    tp: int | None = command.TENSOR_PARALLEL_SIZE,
    max_model_len: int | None = command.MAX_MODEL_LEN,
    gpu: str | None = option(None, "NAME", "GPU to serve on, or cpu. Default: ours."),
    count: int | None = option(None, "N", "How many of that GPU.", min=1),
    fix: Path | None = option(None, "OUT", "Write a copy with config and names corrected."),
    version: str | None = _VLLM_VERSION,
    yes: bool = option(False, None, "Let --fix copy shards without asking.", "--yes"),
    json_file: Path | None = JSON_FILE,
) -> None:
    """Say before loading what would fail or be silently wrong; 1 if so."""
    from mtp_graft.serving.doctor import diagnose
    from mtp_graft.serving.doctor.findings import SEVERITIES
    from mtp_graft.serving.doctor.fix import fix_checkpoint
    from mtp_graft.serving.doctor.hardware import find_target

    if count is not None and gpu is None:
        raise typer.BadParameter("needs --gpu", param_hint="--count")
    target = find_target(gpu, count, tp, max_model_len, checkpoint, version)
    findings = remaining = diagnose(checkpoint, target)
    lines, fixed = list(map(_as_text, findings)), None
    if fix is not None:
        if fix_checkpoint(checkpoint, fix, findings, target, note if yes else _ask_to_copy):
            remaining, fixed = diagnose(fix, target), str(fix)
        left = ", ".join(f.id for f in remaining if f.severity != "note") or "nothing"
        lines.append(f"{fix}: {'written' if fixed else 'nothing to correct'}; left: {left}")
    ok = not any(finding.severity == "error" for finding in remaining)
    result = {
        "checkpoint": str(checkpoint),
        "ok": ok,
        "vllm": target.vllm and str(target.vllm),
        "hardware": target.hardware and str(target.hardware),
        "tp": target.tp,
        "max_model_len": target.max_model_len,
        "findings": [asdict(finding) for finding in findings],
        "fixed": fixed,
        "remaining": [finding.id for finding in remaining],
    }
    show(result, json_file, *lines)
    numbers = [counted(sum(f.severity == s for f in findings), s) for s in SEVERITIES]
    hardware = f"vLLM {target.vllm or 'unknown'} on {target.hardware or 'unknown hardware'}"
    note(f"{checkpoint}: {', '.join(numbers)}; {hardware}")
    raise typer.Exit(0 if ok else 1)


def _ask_to_copy(copies: str) -> None:
    note(copies)
    if not (sys.stdin.isatty() and typer.confirm("Copy them?", err=True)):
        raise GraftError(f"{copies}; that was not allowed, and nothing is written: --yes allows it")


def _as_text(finding: "Finding") -> str:
    keys = ("where", "found", "expected", "why", "cure")
    texts = [f"{key + ':':<10}{getattr(finding, key)}" for key in keys]
    return "\n  ".join([f"{finding.severity}: {finding.id}", *texts])
