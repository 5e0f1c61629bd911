"""Fetch: a checkpoint by its folder or its hub id, as a folder to read from.

Of a base, all shards are fetched; of the upstream master only those that hold the head, one of 46
for DeepSeek-V4-Flash; of a repository with a head that somebody spliced, only that head.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from huggingface_hub import constants

from mtp_graft.checkpoint.files import read_object, write_json
from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD, MANIFEST_NAME
from mtp_graft.checkpoint.shards import INDEX_NAME, read_weight_map
from mtp_graft.errors import GraftError
from mtp_graft.recipe import ModelSection
from mtp_graft.stages.hub import check_hashes, file_sizes, snapshot, write_headers
from mtp_graft.stages.inputs import REPORT_NAME, Progress
from mtp_graft.stages.parallel import is_first_rank

_HEAD = "mtp."
#: What is needed besides shards: of a base configuration, tokenizer, licence.
_BESIDE_SHARDS = {
    "base": (
        *("*.json", "*.txt", "*.jinja", "*.yaml", "*.md", "*.model", "*.py"),
        *("LICENSE*", "NOTICE*"),
    ),
    "head": (INDEX_NAME, "config.json", MANIFEST_NAME),
}


@dataclass(frozen=True)
class FetchedModels:
    """The folders of the two checkpoints."""

    base: Path
    upstream: Path


@dataclass(frozen=True)
class Source:
    """What is needed of one checkpoint, known before its shards are there."""

    given: str  # a folder or a hub id
    folder: Path  # itself, or its snapshot in the hub's cache
    commit: str | None  # of one on the hub
    sizes: Mapping[str, int]  # of the files that are needed, in bytes
    config: Mapping[str, Any]  # empty for a head alone

    @property
    def missing(self) -> list[str]:
        """Return the files that the hub's cache lacks."""
        return [name for name in self.sizes if not (self.folder / name).exists()]

    @property
    def bytes_to_download(self) -> int:
        """Return the size of the files that the hub's cache lacks."""
        return sum(self.sizes[name] for name in self.missing)


def survey(model: ModelSection) -> tuple[Source, Source]:
    """Return what base and upstream are and what of them is needed, fetching small files only.

    Raises GraftError for what is not there, or is no checkpoint.
    """
    base = find_source(model.base, model.base_revision, "base")
    return base, find_source(model.upstream, model.upstream_revision, "head")


def find_source(given: str, revision: str | None, part: Literal["base", "head"]) -> Source:
    """Return what is needed of a folder or a hub id; raises GraftError as `survey` does."""
    if given.startswith(("/", ".", "~")):
        folder, commit = Path(given).expanduser(), None
        if not folder.is_dir():
            raise GraftError(
                f"{folder}: not a folder; expected a checkpoint or a hub id owner/name"
            )
    else:
        folder = snapshot(given, revision, _BESIDE_SHARDS[part])
        commit = folder.name
    if part == "head" and (folder / MANIFEST_NAME).is_file():  # somebody's head, already spliced
        return Source(
            given, folder, commit, _sizes(given, folder, commit, [MANIFEST_NAME, HEAD_SHARD]), {}
        )
    for name in (INDEX_NAME, "config.json"):
        if not (folder / name).is_file():
            raise GraftError(f"{given}: has no {name}; expected a whole checkpoint")
    weight_map = read_weight_map(folder / INDEX_NAME)
    shards = {s for name, s in weight_map.items() if part == "base" or name.startswith(_HEAD)}
    if not shards:
        raise GraftError(
            f"{given}: its index lists no {_HEAD}* tensor; expected the upstream master, "
            "deepseek-ai/DeepSeek-V4-Flash"
        )
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    beside = {p for p in paths if any(fnmatch(p, pattern) for pattern in _BESIDE_SHARDS[part])}
    sizes = _sizes(given, folder, commit, sorted(beside | shards))
    return Source(given, folder, commit, sizes, read_object(folder / "config.json", "a config"))


def _sizes(given: str, folder: Path, commit: str | None, names: Sequence[str]) -> dict[str, int]:
    sizes = {n: (folder / n).stat().st_size for n in names if (folder / n).is_file()}
    if len(sizes) < len(names) and commit is not None:
        listed = file_sizes(given, commit)
        sizes = {name: listed[name] for name in names if name in listed}
    if absent := [name for name in names if name not in sizes]:
        where = "" if commit is None else f" at {commit}; choose another revision"
        raise GraftError(
            f"{given}: has no {absent[0]}, which is needed ({len(absent)} in all){where}"
        )
    return sizes


@contextmanager
def headers_of(source: Source) -> Iterator[Path]:
    """Yield a folder to read a source's config, index and shard headers from.

    Where shards are not in the cache it is a temporary one, in which they have a header and no
    values. A GraftError inside names the source in the folder's place.
    """
    if not source.missing:
        yield source.folder
        return
    assert source.commit is not None, "a folder has all that is needed, or is no source"
    with TemporaryDirectory(prefix="mtp-graft-") as name:
        folder = Path(name)
        for file in source.sizes.keys() - set(source.missing):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).symlink_to(source.folder / file)
        write_headers(source.given, source.commit, source.missing, folder)
        try:
            yield folder
        except GraftError as error:
            said = str(error).replace(str(folder), source.given)
            raise type(error)(said) from error


def fetch(model: ModelSection, out: Path, report: Progress) -> FetchedModels:
    """Return the folders of base and upstream, downloading what is on the hub.

    What an earlier call fetched is taken from `out/report.json`, without asking the hub again.
    Raises GraftError if one cannot be had or its bytes are wrong, if the upstream index lists no
    head, and if the cache's disk has no room.
    """
    if (known := already_fetched(out, model)) is not None:
        return known
    sources = survey(model)
    folders = download(sources, report)
    if is_first_rank():  # of torchrun's, which all come here at once
        out.mkdir(parents=True, exist_ok=True)
        result = {
            **{"base": str(folders[0]), "upstream": str(folders[1])},
            **{"base_commit": sources[0].commit, "upstream_commit": sources[1].commit},
        }
        write_json({**result, "model": asdict(model)}, out / REPORT_NAME)
    return FetchedModels(*folders)


def already_fetched(out: Path, model: ModelSection) -> FetchedModels | None:
    """Return the folders of an earlier call for the same model, if they are still there."""
    try:
        found = json.loads((out / REPORT_NAME).read_text())
    except (OSError, ValueError):
        return None
    folders = FetchedModels(Path(found["base"]), Path(found["upstream"]))
    there = folders.base.is_dir() and folders.upstream.is_dir()
    return folders if there and found["model"] == asdict(model) else None


def download(sources: Sequence[Source], report: Progress) -> list[Path]:
    """Return the sources' folders with all that is needed; large files' hashes are compared."""
    _check_cache_room(sources)
    return [_download(source, report) for source in sources]


def _check_cache_room(sources: Sequence[Source]) -> None:
    needed = sum(source.bytes_to_download for source in sources)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(nearest_folder(cache)).free
    if needed > free:
        raise GraftError(
            f"{cache}: {free:,} bytes free, {needed:,} needed to download "
            f"{' and '.join(s.given for s in sources if s.missing)}; make room, or set "
            "HF_HOME to a larger disk"
        )


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists: on whose disk it will be."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _download(source: Source, report: Progress) -> Path:
    if source.commit is None:
        return source.folder
    label, total = f"fetch: {source.given}", source.bytes_to_download
    done = 0

    def on_bytes(here: int) -> None:  # of two bars, one of which may lag behind
        nonlocal done
        done = max(done, min(here, total))
        report(label, done, total)

    if source.missing:
        report(label, 0, total)
        snapshot(source.given, source.commit, list(source.sizes), on_bytes)
    check_hashes(source.folder, list(source.sizes), report)
    return source.folder
