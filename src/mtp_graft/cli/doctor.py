"""`mtp-graft doctor`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mtp_graft.cli.app import (
    JsonOption,
    MaxModelLenOption,
    TensorParallelOption,
    app,
    argument,
    option,
)
from mtp_graft.cli.output import note, show


@app.command()
def doctor(
    checkpoint: Annotated[Path, argument("CHECKPOINT", "A DeepSeek-V4 checkpoint folder.")],
    tp: TensorParallelOption = None,
    max_model_len: MaxModelLenOption = None,
    gpu: Annotated[str | None, option("NAME", "GPU to serve on, or cpu. Default: ours.")] = None,
    count: Annotated[int | None, option("N", "How many of that GPU.", min=1)] = None,
    fix: Annotated[
        Path | None, option("OUT", "Write a copy with config and names corrected.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Say before loading what would fail or be silently wrong; 1 if so."""
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
    lines = []
    for finding in findings:
        texts = [f"{key + ':':<10}{getattr(finding, key)}" for key in finding.TEXTS]
        lines.append("\n  ".join([f"{finding.severity}: {finding.id}", *texts]))
    if fixed:
        left = ", ".join(f.id for f in remaining if f.severity != "note") or "nothing"
        lines.append(f"{fix}: written; left: {left}")
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
    show(result, json_file, *lines)
    counts = {s: sum(finding.severity == s for finding in findings) for s in SEVERITIES}
    numbers = ", ".join(f"{n} {s}{'' if n == 1 else 's'}" for s, n in counts.items())
    vllm, hardware = target.vllm or "unknown", target.hardware or "unknown hardware"
    note(f"{checkpoint}: {numbers}; vLLM {vllm} on {hardware}")
    raise typer.Exit(0 if ok else 1)
