"""Graft: the short way to a checkpoint with a head, without calibration: fetch, splice, verify.

The head is the upstream master's, its MXFP4 codes kept or decoded to BF16 (both exact), or one that
somebody has published, which is taken as it is.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtp_graft.errors import GraftError
from mtp_graft.stages.fetch import Source, download, find_source, headers_of
from mtp_graft.stages.inputs import Progress
from mtp_graft.stages.splice import check_space, splice
from mtp_graft.stages.splice_plan import SplicePlan, plan_splice
from mtp_graft.stages.verify import require_sound, verify

#: What can be made of upstream's head without calibration.
Head = Literal["mxfp4", "bf16"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder or a hub id, the latter at a branch, tag or commit."""

    given: str
    revision: str | None = None


def plan_graft(
    base: Checkpoint, upstream: Checkpoint, out: Path, head: Head | None, *, copy: bool = False
) -> dict[str, Any]:
    """Return what `graft` would download and write, having checked what can be: for `--dry-run`.

    Fetches small files and shard headers only. Raises GraftError as `graft` does.
    """
    sources, plan = _prepare(base, upstream, out, head, copy=copy)
    return {
        "checkpoint": str(out),
        "head": plan.variant,
        "sources": {
            name: {
                "source": source.given,
                "commit": source.commit,
                "files": dict(source.sizes),
                "bytes_to_download": source.bytes_to_download,
            }
            for name, source in zip(("base", "upstream"), sources, strict=True)
        },
        "bytes_to_write": plan.bytes,
    }


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
    sources, _ = _prepare(base, upstream, out, head, copy=copy)
    folders = download(sources, report)
    report("graft: splice", 0, 0)
    spliced = splice(folders[0], folders[1], out, head, copy=copy)
    report("graft: verify", 0, 0)
    found = verify(out, folders[0], folders[1])
    require_sound(out, found)
    return {
        "checkpoint": str(out),
        "head": spliced.variant,
        "bytes_written": spliced.bytes_written,
        "seconds": time.perf_counter() - started,
        "verified": found["ok"],
        "tensors": spliced.tensors,
        "base_files_linked": found["base_files_linked"],
        "commits": {"base": sources[0].commit, "upstream": sources[1].commit},
    }


def _prepare(
    base: Checkpoint, upstream: Checkpoint, out: Path, head: Head | None, *, copy: bool
) -> tuple[Sequence[Source], SplicePlan]:
    """Refuse what can be refused before a shard is downloaded."""
    if out.exists():
        raise GraftError(f"{out}: already exists; remove it or choose another folder")
    sources = [
        find_source(_located(base.given), base.revision, "base"),
        find_source(_located(upstream.given), upstream.revision, "head"),
    ]
    with ExitStack() as stack:
        folders = [stack.enter_context(headers_of(source)) for source in sources]
        plan = plan_splice(folders[0], folders[1], head)
    base_bytes = sum(sources[0].sizes.values())
    check_space(out, plan, sources[0].folder, base_bytes, copy=copy)
    return sources, plan


def _located(given: str) -> str:
    """Return a folder's absolute path; a hub id as it is."""
    folder = Path(given).expanduser()
    return str(folder.absolute()) if folder.is_dir() or given.count("/") != 1 else given
