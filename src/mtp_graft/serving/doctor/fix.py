"""A corrected copy of a checkpoint, where the cure is config or naming, of hard links mostly."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mtp_graft.checkpoint.files import new_folder, read_object, visible_files, write_json
from mtp_graft.checkpoint.quantization_config import QuantizationConfig
from mtp_graft.checkpoint.shards import INDEX_NAME, Shard, stream_shard, write_index
from mtp_graft.errors import GraftError
from mtp_graft.serving.doctor import examine
from mtp_graft.serving.doctor.checkpoint import Checkpoint, read_checkpoint
from mtp_graft.serving.doctor.findings import Finding
from mtp_graft.serving.doctor.hardware import Target
from mtp_graft.serving.doctor.schemes import corrected


def fix_checkpoint(
    folder: Path,
    out: Path,
    findings: Sequence[Finding],
    target: Target,
    allow_copy: Callable[[str], None],
) -> bool:
    """Write `out`, a copy with everything corrected that --fix cures; return False without any.

    `allow_copy` is told how many bytes have to be copied, before anything is, and raises if they
    may not. Raises GraftError for an `out` that exists, is in the checkpoint or on another file
    system, where files cannot be linked, and for a checkpoint with errors that --fix does not cure.
    """
    cures = {finding.id for finding in findings if finding.fixable}
    if not cures:
        return False
    if out.exists() or out.resolve().is_relative_to(folder.resolve()):
        raise GraftError(f"{out}: already exists or is in {folder}; choose another folder")
    checkpoint = read_checkpoint(folder)
    fixed = _fixed(checkpoint, cures)
    twice = [finding for finding in findings if finding.id == "tensor-twice"]
    for found in [*twice, *examine(fixed, Target(None, target.platform, None))]:
        if found.severity == "error":  # vLLM's and the hardware's are not the checkpoint's
            raise GraftError(
                f"{folder}: {found.where}: {found.found}, expected {found.expected}; --fix "
                f"corrects config and names only: {found.cure}"
            )
    misnamed = checkpoint.misnamed.keys()
    copied = {shard for shard, held in checkpoint.shards.items() if held.keys() & misnamed}
    if copied:
        size, number = sum((folder / s).stat().st_size for s in copied), len(checkpoint.shards)
        allow_copy(f"{out}: copies {size:,} bytes, {len(copied)} of {number} shards")
    with new_folder(out) as temporary:
        _write(checkpoint, fixed, temporary, copied)
    return True


def _fixed(checkpoint: Checkpoint, cures: set[str]) -> Checkpoint:
    """Return the checkpoint as it should read; what has no known cure stays."""
    config, right = dict(checkpoint.config), checkpoint.misnamed
    if "nextn-count" in cures:
        config["num_nextn_predict_layers"] = 1
    if "compress-ratios" in cures:
        config["compress_ratios"] = [*checkpoint.ratios[: checkpoint.num_layers], 0]
    if isinstance(checkpoint.quantization, QuantizationConfig) and not checkpoint.foreign_format:
        config["quantization_config"] = corrected(checkpoint)
    shards = {
        shard: {right.get(name, name): tensor for name, tensor in held.items()}
        for shard, held in checkpoint.shards.items()
    }
    held = {name: shard for shard, found in shards.items() for name in found}
    listed = {right.get(name, name): shard for name, shard in checkpoint.index.items()}
    index = dict(sorted((listed | held).items()))
    return Checkpoint(checkpoint.folder, config, index, shards, checkpoint.unreadable)


def _write(checkpoint: Checkpoint, fixed: Checkpoint, out: Path, copied: set[str]) -> None:
    for name, source in visible_files(checkpoint.folder).items():
        target = out / name
        if name in (INDEX_NAME, "config.json", *checkpoint.stale):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in copied:
            with Shard(source) as shard:
                names = zip(fixed.shards[name], shard.meta, strict=True)
                tensors = ((new, shard.read([old])[old]) for new, old in names)
                stream_shard(fixed.shards[name], tensors, target)
            continue
        try:
            os.link(source.resolve(), target)
        except OSError as error:  # nothing is copied behind the user's back
            raise GraftError(
                f"{target}: cannot be linked ({error.strerror}); choose a folder on the same file "
                "system as the checkpoint"
            ) from error
    write_json(fixed.config, out / "config.json")
    metadata = read_object(checkpoint.folder / INDEX_NAME, "an index").get("metadata")
    total = sum(tensor.nbytes for tensor in fixed.tensors.values())
    write_index(fixed.index, total, out, metadata)
