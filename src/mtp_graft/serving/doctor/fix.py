"""A corrected copy of a checkpoint, where the cure is config or naming.

Files that stay as they are become hard links; a shard with misnamed tensors is written anew. The
checkpoint itself is never written to.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mtp_graft.checkpoint.files import new_folder, read_object, write_json
from mtp_graft.checkpoint.quantization_config import QuantizationConfig
from mtp_graft.checkpoint.shards import INDEX_NAME, Shard, stream_shard, write_index
from mtp_graft.errors import GraftError
from mtp_graft.serving.doctor.checkpoint import Checkpoint, read_checkpoint
from mtp_graft.serving.doctor.findings import Finding
from mtp_graft.serving.doctor.schemes import corrected


def fix_checkpoint(
    folder: Path, out: Path, findings: Iterable[Finding], report: Callable[[str], None]
) -> bool:
    """Write `out`, a copy with everything corrected that --fix cures; return False without any.

    `report` is told how many bytes have to be copied. Raises GraftError for an `out` that exists or
    is on another file system, where files cannot be linked, and for unreadable shards.
    """
    if not any(finding.fixable for finding in findings):
        report(f"{folder}: nothing that --fix corrects; {out} was not written")
        return False
    checkpoint = read_checkpoint(folder)
    if out.exists():
        raise GraftError(f"{out}: already exists; remove it or choose another folder")
    for shard, reason in checkpoint.unreadable.items():
        raise GraftError(
            f"{folder / shard}: {reason}; --fix corrects config and names only: fetch the shard "
            "again first"
        )
    misnamed = checkpoint.misnamed.keys()
    copied = {shard for shard, held in checkpoint.shards.items() if held.keys() & misnamed}
    if copied:
        size = sum((folder / shard).stat().st_size for shard in copied)
        report(f"{out}: copies {size:,} bytes, {len(copied)} shards with misnamed tensors")
    with new_folder(out) as temporary:
        _write(checkpoint, temporary, copied)
    return True


def _write(checkpoint: Checkpoint, out: Path, copied: set[str]) -> None:
    misnamed = checkpoint.misnamed
    for source in sorted(checkpoint.folder.rglob("*")):
        target = out / source.relative_to(checkpoint.folder)
        if not source.is_file() or target in (out / INDEX_NAME, out / "config.json"):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.name not in copied:
            _link(source.resolve(), target)
            continue
        with Shard(source) as shard:
            renamed = {misnamed.get(name, name): name for name in shard.meta}
            layout = {name: shard.meta[old] for name, old in renamed.items()}
            tensors = ((name, shard.read([old])[old]) for name, old in renamed.items())
            stream_shard(layout, tensors, target)
    write_json(_corrected_config(checkpoint), out / "config.json")
    index = {misnamed.get(n, n): s for s, held in checkpoint.shards.items() for n in held}
    metadata = read_object(checkpoint.folder / INDEX_NAME, "an index").get("metadata")
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    write_index(dict(sorted(index.items())), total, out, metadata)


def _corrected_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return config.json as it should read; what has no known cure stays."""
    config, layers = dict(checkpoint.config), checkpoint.num_layers
    if checkpoint.foreign_format:
        return config
    if checkpoint.has_head:
        config["num_nextn_predict_layers"] = 1
        if len(checkpoint.ratios) >= layers and "compress_ratios" in config:
            config["compress_ratios"] = [*checkpoint.ratios[:layers], 0]
    if isinstance(checkpoint.quantization, QuantizationConfig):
        config["quantization_config"] = corrected(checkpoint)
    return config


def _link(source: Path, target: Path) -> None:
    """Link a file; nothing is copied behind the user's back."""
    try:
        os.link(source, target)
    except OSError as error:
        raise GraftError(
            f"{target}: cannot be linked ({error.strerror}); choose a folder on the same file "
            "system as the checkpoint"
        ) from error
