"""Doctor: what would fail or be silently wrong with a checkpoint, said before it is loaded.

A check is a function of the checkpoint and the target (what it is to be served with) that yields
findings; to add one, write it and put it into a list below.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from mtp_graft.checkpoint.makers import PRUNED, read_maker
from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.errors import GraftError
from mtp_graft.serving.doctor import hardware, schemes, tensors
from mtp_graft.serving.doctor.checkpoint import Checkpoint, read_checkpoint
from mtp_graft.serving.doctor.findings import SEVERITIES, Finding, finding
from mtp_graft.serving.doctor.hardware import Target

Check = Callable[[Checkpoint, Target], Iterable[Finding]]

_OF_ALL: tuple[Check, ...] = (tensors.shards, tensors.index, hardware.vllm)
_OF_TENSORS = (tensors.files, tensors.names, tensors.contents, tensors.precision, tensors.config)
_OF_SCHEMES = (schemes.section, schemes.schemes)
_OF_HARDWARE = (hardware.ranks, hardware.memory, hardware.known_issues)


def diagnose(folder: Path, target: Target) -> list[Finding]:
    """Return every finding, errors first; of a config or index that cannot be used, that alone.

    Raises GraftError for what is no folder.
    """
    if not folder.is_dir() and not (folder.is_file() and folder.suffix.lower() == ".gguf"):
        raise GraftError(f"{folder}: not a folder; expected a checkpoint with config.json")
    try:
        checkpoint = read_checkpoint(folder)
    except GraftError as error:
        if (maker := read_maker(folder)) and not maker.startswith(PRUNED):
            return [finding("foreign-format", folder.name, maker, "W4A16-FP8")]
        file, _, found = str(error).removeprefix(f"{folder}/").partition(": ")
        kind = "index-unusable" if file == INDEX_NAME else "config-unusable"
        return [finding(kind, file, found, "that of a sharded DeepSeek-V4 checkpoint")]
    return examine(checkpoint, target)


def examine(checkpoint: Checkpoint, target: Target) -> list[Finding]:
    """Return every finding of a checkpoint that has been read, errors first."""
    found, checks = [*target.findings], (*_OF_TENSORS, *_OF_SCHEMES, *_OF_HARDWARE, *_OF_ALL)
    if (maker := checkpoint.foreign_format) is not None:
        kind = "pruned" if maker.startswith(PRUNED) else "foreign-format"
        found.append(finding(kind, checkpoint.folder.name, maker, "W4A16-FP8"))
        checks = _OF_ALL
    found += [each for check in checks for each in check(checkpoint, target)]
    return sorted(found, key=lambda each: SEVERITIES.index(each.severity))
