"""`mtp-graft doctor`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mtp_graft.cli.app import JsonOption, app
from mtp_graft.cli.help import SERVE, SectionedCommand
from mtp_graft.cli.output import note, result_console, write_json


@app.command(cls=SectionedCommand, rich_help_panel=SERVE)
def doctor(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A DeepSeek-V4 checkpoint folder.")
    ],
    tp: Annotated[
        int | None,
        typer.Option(
            *("--tensor-parallel-size", "--tp"),
            min=1,
            metavar="N",
            help="Ranks to shard over. Default: as many GPUs as `serve` would use.",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Longest sequence. Default: the model's.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="GPU to serve on, or cpu. Default: ours.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many of that GPU.")
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write a copy with config and names corrected."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Say what would fail or be silently wrong before loading; 1 if anything is an error."""
    from mtp_graft.serving.doctor import diagnose
    from mtp_graft.serving.doctor.findings import SEVERITIES
    from mtp_graft.serving.doctor.fix import fix_checkpoint
    from mtp_graft.serving.doctor.hardware import find_target

    if count is not None and gpu is None:
        raise typer.BadParameter("needs --gpu", param_hint="--count")
    target = find_target(gpu, count, tp, max_model_len, checkpoint)
    findings = diagnose(checkpoint, target)
    fixed = fix is not None and fix_checkpoint(checkpoint, fix, findings, note)
    remaining = diagnose(fix, target) if fix and fixed else findings
    ok = not any(finding.severity == "error" for finding in remaining)
    console = result_console(json_file)
    for finding in findings:
        lines = [f"{key + ':':<10}{getattr(finding, key)}" for key in finding.TEXTS]
        text = "\n  ".join([f"{finding.severity}: {finding.id}", *lines])
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if fixed:
        left = ", ".join(f.id for f in remaining if f.severity != "note") or "nothing"
        console.print(f"{fix}: written; left: {left}", markup=False, highlight=False)
    counts = {s: sum(finding.severity == s for finding in findings) for s in SEVERITIES}
    numbers = ", ".join(f"{n} {s}{'' if n == 1 else 's'}" for s, n in counts.items())
    vllm, hardware = target.vllm or "unknown", target.hardware or "unknown hardware"
    note(f"{checkpoint}: {numbers}; vLLM {vllm} on {hardware}")
    result = {
        "checkpoint": str(checkpoint),
        "ok": ok,
        "vllm": str(target.vllm) if target.vllm else None,
        "hardware": str(target.hardware) if target.hardware else None,
        "tp": target.tp,
        "max_model_len": target.max_model_len,
        "findings": [asdict(finding) for finding in findings],
        "fixed": str(fix) if fixed else None,
        "remaining": [finding.id for finding in remaining],
    }
    write_json(result, json_file)
    raise typer.Exit(0 if ok else 1)
