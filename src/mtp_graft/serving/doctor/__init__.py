"""Doctor: what would fail or be silently wrong with a checkpoint, said before it is loaded.

A check is a function of the survey (what the checkpoint is) and the target (what it is to be
served with) that yields findings; to add one, write it and put it into `CHECKS`.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from mtp_graft.serving.doctor import files, hardware, known_issues, model, schemes, tensors
from mtp_graft.serving.doctor.findings import SEVERITIES, Finding
from mtp_graft.serving.doctor.survey import Survey, Unusable, read_survey
from mtp_graft.serving.doctor.target import Target

Check = Callable[[Survey, Target], Iterable[Finding]]

CHECKS: tuple[Check, ...] = (
    files.unreadable_shards,
    files.entries_without_tensor,
    files.tensors_without_entry,
    files.tensors_twice,
    tensors.dspark_drafter,
    tensors.wrong_names,
    tensors.missing_tensors,
    tensors.unknown_tensors,
    tensors.wrong_shapes,
    tensors.wrong_dtypes,
    tensors.wrong_scales,
    tensors.rounded_float32,
    tensors.quantized_compressors,
    model.absent_head,
    model.head_count,
    model.compress_ratios,
    schemes.no_section,
    schemes.group_sizes,
    schemes.patterns_for_mtp,
    schemes.patterns_too_wide,
    schemes.idle_patterns,
    schemes.half_named,
    schemes.mismatches,
    hardware.unknown_gpus,
    hardware.gpu_count,
    hardware.head_division,
    hardware.group_division,
    hardware.positions,
    hardware.memory,
    known_issues.vllm_version,
    known_issues.plugin,
    known_issues.known_issues,
)


def diagnose(checkpoint: Path, target: Target) -> list[Finding]:
    """Return every finding, errors first; raises GraftError for what is no folder.

    Where config or index cannot be used, that is the only finding.
    """
    try:
        survey = read_survey(checkpoint)
    except Unusable as error:
        return [files.unusable(error)]
    return examine(survey, target)


def examine(survey: Survey, target: Target) -> list[Finding]:
    """Return every finding of a checkpoint that has been read, errors first."""
    found = [finding for check in CHECKS for finding in check(survey, target)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
