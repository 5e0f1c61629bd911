"""`mtp-graft doctor`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mtp_graft.bench.page import counted
from mtp_graft.cli.app import JSON_FILE, app
from mtp_graft.cli.output import note, show
from mtp_graft.serving.command import MAX_MODEL_LEN, TENSOR_PARALLEL_SIZE, argument, option

if TYPE_CHECKING:
    from mtp_graft.serving.doctor.findings import Finding


@app.command()
def doctor(
    checkpoint: Path = argument("CHECKPOINT", "A DeepSeek-V4 checkpoint folder."),
    tp: int | None = TENSOR_PARALLEL_SIZE,
    max_model_len: int | None = MAX_MODEL_LEN,
    gpu: str | None = option(None, "NAME", "GPU to serve on, or cpu. Default: ours."),
    count: int | None = option(None, "N", "How many of that GPU.", min=1),
    fix: Path | None = option(None, "OUT", "Write a copy with config and names corrected."),
    json_file: Path | None = JSON_FILE,
) -> None:
    """Say before loading what would fail or be silently wrong; 1 if so."""
    from mtp_graft.serving.doctor import diagnose
    from mtp_graft.serving.doctor.fix import fix_checkpoint
    from mtp_graft.serving.doctor.hardware import find_target

    if count is not None and gpu is None:
        raise typer.BadParameter("needs --gpu", param_hint="--count")
    target = find_target(gpu, count, tp, max_model_len, checkpoint)
    findings = remaining = diagnose(checkpoint, target)
    lines, fixed = list(map(_as_text, findings)), None
    if fix is not None and fix_checkpoint(checkpoint, fix, findings, note):
        remaining, fixed = diagnose(fix, target), str(fix)
        left = ", ".join(f.id for f in remaining if f.severity != "note") or "nothing"
        lines.append(f"{fix}: written; left: {left}")
    ok = not any(finding.severity == "error" for finding in remaining)
    result = {
        "checkpoint": str(checkpoint),
        "ok": ok,
        "vllm": str(target.vllm) if target.vllm else None,
        "hardware": str(target.hardware) if target.hardware else None,
        "tp": target.tp,
        "max_model_len": target.max_model_len,
        "findings": [asdict(finding) for finding in findings],
        "fixed": fixed,
        "remaining": [finding.id for finding in remaining],
    }
    show(result, json_file, *lines)
    hardware = target.hardware or "unknown hardware"
    note(f"{checkpoint}: {_count(findings)}; vLLM {target.vllm or 'unknown'} on {hardware}")
    raise typer.Exit(0 if ok else 1)


def _as_text(finding: "Finding") -> str:
    texts = [f"{key + ':':<10}{getattr(finding, key)}" for key in finding.TEXTS]
    return "\n  ".join([f"{finding.severity}: {finding.id}", *texts])


def _count(findings: "list[Finding]") -> str:
    from mtp_graft.serving.doctor.findings import SEVERITIES

    severities = [finding.severity for finding in findings]
    return ", ".join(counted(severities.count(each), each) for each in SEVERITIES)
