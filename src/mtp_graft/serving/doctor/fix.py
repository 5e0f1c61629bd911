"""A corrected copy of a checkpoint, where the cure is config or naming.

Files that stay as they are become hard links; a shard with misnamed tensors gets a new header
before the same bytes. The checkpoint itself is never written to.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from mtp_graft.checkpoint.shards import INDEX_NAME, num_bytes, write_index, write_json
from mtp_graft.errors import GraftError
from mtp_graft.serving.doctor.schemes import corrected_section, usable
from mtp_graft.serving.doctor.survey import Survey


def write_corrected(survey: Survey, out: Path) -> None:
    """Write `out`, a copy of the checkpoint with everything corrected that `--fix` cures.

    Raises GraftError for an `out` that exists, and for a checkpoint with unreadable shards.
    """
    if out.exists():
        raise GraftError(f"{out}: already exists; remove it or choose another folder")
    if survey.unreadable:
        shard = next(iter(survey.unreadable))
        raise GraftError(
            f"{survey.folder / shard}: {survey.unreadable[shard]}; --fix corrects config and "
            "names only: fetch the shard again first"
        )
    folder = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        _write(survey, folder)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(survey: Survey, folder: Path) -> None:
    for source in sorted(survey.folder.rglob("*")):
        inside = source.relative_to(survey.folder)
        if not source.is_file() or str(inside) in (INDEX_NAME, "config.json"):
            continue
        target = folder / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        renamed = {
            n: survey.renamed[n] for n in survey.shards.get(str(inside), {}) if n in survey.renamed
        }
        if renamed:
            _rename_tensors(source, target, renamed)
        else:
            _link(source.resolve(), target)
    write_json(corrected_config(survey), folder / "config.json")
    index = {
        survey.renamed.get(name, name): shard
        for shard, held in survey.shards.items()
        for name in held
    }
    metadata = json.loads((survey.folder / INDEX_NAME).read_text()).get("metadata") or {}
    total = sum(map(num_bytes, survey.tensors.values()))
    write_index(dict(sorted(index.items())), total, folder, metadata)


def corrected_config(survey: Survey) -> dict[str, Any]:
    """Return config.json as it should read; what has no known cure stays."""
    config = deepcopy(dict(survey.config))
    ratios, layers = survey.ratios, survey.num_layers
    if survey.has_head:
        config["num_nextn_predict_layers"] = 1
        if len(ratios) >= layers:
            config["compress_ratios"] = [*ratios[:layers], 0]
    if usable(survey):
        config["quantization_config"] = corrected_section(survey)
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
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copy2(source, target)
