"""Graft: the short way to a checkpoint with a head, without calibration: fetch, splice, verify.

The head is the upstream master's, its MXFP4 codes kept or decoded to BF16 (both exact), or one that
somebody has published, which is taken as it is.
"""

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from mtp_graft.errors import GraftError
from mtp_graft.stages.fetch import Source, download, find_source, headers_of, nearest_folder
from mtp_graft.stages.inputs import Progress
from mtp_graft.stages.splice import open_base, plan_splice, splice

#: What can be made of upstream's head without calibration.
Head = Literal["mxfp4", "bf16"]
#: A folder or a hub id, the latter at a branch, tag or commit.
Checkpoint = tuple[str, str | None]


def graft(
    base: Checkpoint,
    upstream: Checkpoint,
    out: Path,
    head: Head | None = None,
    *,
    copy: bool = False,
    report: Progress,
) -> dict[str, Any]:
    """Write `out`: the base with a head; return `checkpoint`, `head`, `bytes_written`, and so on.

    `head` is mxfp4 unless given; a published head is what it is. Raises GraftError for inputs that
    cannot be had or do not fit each other, an `out` that exists, a full disk, and a checkpoint that
    does not verify.
    """
    started = time.perf_counter()
    report("graft: read headers", 0, 0)
    sources = _prepare(base, upstream, out, head, copy)
    folders = download(sources, report)
    report("graft: splice", 0, 0)
    spliced = splice(folders[0], folders[1], out, head, copy=copy)
    from mtp_graft.stages.verify import require_sound, verify  # takes seconds to import

    report("graft: verify", 0, 0)
    found = verify(out, folders[0], folders[1])
    require_sound(out, found)
    return {
        "checkpoint": str(out),
        "head": spliced.variant,
        "bytes_written": spliced.bytes,
        "seconds": time.perf_counter() - started,
        "verified": found["ok"],
        "tensors": len(spliced.layout),
        "base_files_linked": found["base_files_linked"],
        "commits": {"base": sources[0].commit, "upstream": sources[1].commit},
    }


def _prepare(
    base: Checkpoint, upstream: Checkpoint, out: Path, head: Head | None, copy: bool
) -> list[Source]:
    """Return what is needed; refuse what can be refused before a shard is downloaded."""
    if out.exists():
        raise GraftError(f"{out}: already exists; remove it or choose another folder")
    sources = [_find(base, "base"), _find(upstream, "head")]
    with ExitStack() as stack:
        folders = [stack.enter_context(headers_of(source)) for source in sources]
        needed = plan_splice(open_base(folders[0]), folders[1], head).bytes
    place = nearest_folder(out)
    if copy or place.stat().st_dev != nearest_folder(sources[0].folder).stat().st_dev:
        needed += sum(sources[0].sizes.values())
    if needed > (free := shutil.disk_usage(place).free):
        raise GraftError(f"{out}: {free:,} bytes free on its disk, {needed:,} needed; make room")
    return sources


def _find(checkpoint: Checkpoint, part: Literal["base", "head"]) -> Source:
    """Return what is needed of a checkpoint; what is no folder and has one slash is a hub id."""
    given, revision = checkpoint
    folder = Path(given).expanduser()
    is_folder = folder.is_dir() or given.count("/") != 1
    return find_source(str(folder.absolute()) if is_folder else given, revision, part)
