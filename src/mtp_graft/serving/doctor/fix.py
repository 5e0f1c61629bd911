"""A corrected copy of a checkpoint, where the cure is config or naming.

Files that stay as they are become hard links; a shard with misnamed tensors gets a new header
before the same bytes. The checkpoint itself is never written to.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mtp_graft.checkpoint.files import write_json
from mtp_graft.checkpoint.quantization_config import QuantizationConfig
from mtp_graft.checkpoint.shards import INDEX_NAME, write_index
from mtp_graft.errors import GraftError
from mtp_graft.serving.doctor.checkpoint import Checkpoint, read_checkpoint
from mtp_graft.serving.doctor.findings import Finding
from mtp_graft.serving.doctor.schemes import corrected


def fix_checkpoint(
    folder: Path, out: Path, findings: Iterable[Finding], report: Callable[[str], None]
) -> bool:
    """Write `out`, a copy with everything corrected that --fix cures; return False without any.

    `report` is told how many bytes have to be copied. Raises GraftError for an `out` that exists or
    is on another file system, where shards cannot be linked, and for unreadable shards.
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
    if copied := _copied(checkpoint):
        size = sum((folder / shard).stat().st_size for shard in copied)
        report(f"{out}: copies {size:,} bytes, {len(copied)} shards with misnamed tensors")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(checkpoint, temporary, copied)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return True


def _copied(checkpoint: Checkpoint) -> set[str]:
    """Return the shards that have to be rewritten, since they hold misnamed tensors."""
    misnamed = checkpoint.misnamed.keys()
    return {shard for shard, held in checkpoint.shards.items() if held.keys() & misnamed}


def _write(checkpoint: Checkpoint, folder: Path, copied: set[str]) -> None:
    for source in sorted(checkpoint.folder.rglob("*")):
        target = folder / source.relative_to(checkpoint.folder)
        if not source.is_file() or target in (folder / INDEX_NAME, folder / "config.json"):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.name in copied:
            _rename_tensors(source, target, checkpoint.misnamed)
        else:
            _link(source.resolve(), target)
    write_json(_corrected_config(checkpoint), folder / "config.json")
    index = {
        checkpoint.misnamed.get(name, name): shard
        for shard, held in checkpoint.shards.items()
        for name in held
    }
    metadata = json.loads((checkpoint.folder / INDEX_NAME).read_text()).get("metadata") or {}
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    write_index(dict(sorted(index.items())), total, folder, metadata)


def _corrected_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return config.json as it should read; what has no known cure stays."""
    config = dict(checkpoint.config)
    if checkpoint.foreign_format:
        return config
    ratios, layers = checkpoint.ratios, checkpoint.num_layers
    if checkpoint.has_head:
        config["num_nextn_predict_layers"] = 1
        if len(ratios) >= layers:
            config["compress_ratios"] = [*ratios[:layers], 0]
    if isinstance(checkpoint.quantization, QuantizationConfig):
        config["quantization_config"] = corrected(checkpoint)
    return config


def _rename_tensors(source: Path, target: Path, names: Mapping[str, str]) -> None:
    """Copy a safetensors file with other names in its header; offsets count from its end."""
    with source.open("rb") as old, target.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        renamed = {names.get(name, name): entry for name, entry in header.items()}
        text = json.dumps(renamed, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, 16 * 2**20)
        new.flush()
        os.fsync(new.fileno())


def _link(source: Path, target: Path) -> None:
    """Link a file; a shard of another file system is not copied behind the user's back."""
    try:
        os.link(source, target)
    except OSError as error:
        if source.suffix == ".safetensors":
            raise GraftError(
                f"{target}: cannot be linked from another file system ({error.strerror}); choose "
                "a folder on the same one as the checkpoint"
            ) from error
        shutil.copy2(source, target)
