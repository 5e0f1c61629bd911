"""Graft: the short way to a checkpoint with a head, without calibration: fetch, splice, verify.

The head is the upstream master's, its MXFP4 codes kept or decoded to BF16 (both exact), or one that
somebody has published, which is taken as it is.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from mtp_graft.errors import GraftError
from mtp_graft.pipeline.plan import as_json, check_room, disk_needs
from mtp_graft.recipe import Variant
from mtp_graft.stages.fetch import Source, download, find_source, headers_of, warn_of_releases
from mtp_graft.stages.inputs import Progress
from mtp_graft.stages.splice import open_base, plan_splice, splice

#: A folder or a hub id, the latter at a branch, tag or commit.
Checkpoint = tuple[str, str | None]


def graft(
    base: Checkpoint,
    upstream: Checkpoint,
    out: Path,
    head: Variant | None = None,
    *,
    copy: bool = False,
    dry_run: bool = False,
    report: Progress,
) -> dict[str, Any]:
    """Write `out`: the base with a head; return `checkpoint`, `head`, `bytes_written`, and so on.

    `head` is mxfp4 unless given; a published head is what it is. With `dry_run` nothing is done,
    and the result has a run's plan. Raises GraftError for inputs that do not fit or would not be
    served, an `out` that exists, a full disk, and a checkpoint that does not verify.
    """
    started = time.perf_counter()
    report("graft: read headers", 0, 0)
    if out.exists():
        raise GraftError(f"{out}: already exists; remove it or choose another folder")
    sources = _find(base, "base"), _find(upstream, "head")
    warn_of_releases(*sources)
    with headers_of(sources[0]) as base_folder, headers_of(sources[1]) as upstream_folder:
        planned = plan_splice(open_base(base_folder), upstream_folder, head)
    needs = disk_needs(sources, out, [planned.bytes], copy=copy)
    check_room(needs)
    result: dict[str, Any] = {
        "checkpoint": str(out),
        "head": planned.variant,
        "bytes_written": planned.bytes,
        "tensors": len(planned.layout),
        "commits": {"base": sources[0].commit, "upstream": sources[1].commit},
    }
    if dry_run:
        result |= {"run": str(out), "stages": ["fetch", "splice", "verify"], "seconds": {}}
        result |= {"sources": {"base": as_json(sources[0]), "upstream": as_json(sources[1])}}
        result |= {"needs": [asdict(need) for need in needs], "inputs": "fit", "room": "enough"}
        return {**result, "unknown": None}
    folders = download(sources, report)
    report("graft: splice", 0, 0)
    splice(folders[0], folders[1], out, head, copy=copy)
    from mtp_graft.stages.verify import require_sound, verify  # takes seconds to import

    report("graft: verify", 0, 0)
    found = verify(out, folders[0], folders[1])
    require_sound(out, found)
    return {
        **result,
        "seconds": time.perf_counter() - started,
        "verified": found["ok"],
        "base_files_linked": found["base_files_linked"],
    }


def _find(checkpoint: Checkpoint, part: Literal["base", "head"]) -> Source:
    """Return what is needed of a checkpoint; what is no folder and has one slash is a hub id."""
    given, revision = checkpoint
    folder = Path(given).expanduser()
    is_folder = folder.is_dir() or given.count("/") != 1
    return find_source(str(folder.absolute()) if is_folder else given, revision, part)
