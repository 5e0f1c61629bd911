"""Fetch: a checkpoint by its folder or its hub id, as a folder to read from.

Of a base on the hub, the shards that its index names are fetched, and the small files beside them;
of the upstream master only the shards that hold the head: one of 46 for DeepSeek-V4-Flash. What is
large is hashed once and compared with what the hub announced.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

from huggingface_hub import constants

from mtp_graft.checkpoint.files import read_object, read_weight_map, sha256
from mtp_graft.checkpoint.shards import INDEX_NAME, read_index, write_json
from mtp_graft.dsv4.names import HEAD_PREFIX
from mtp_graft.errors import GraftError
from mtp_graft.recipe import ModelSection
from mtp_graft.stages.hub import (
    HubFile,
    Repository,
    download,
    fetch_small,
    read_headers,
    read_repository,
)
from mtp_graft.stages.inputs import REPORT_NAME, Progress
from mtp_graft.stages.parallel import is_first_rank

_HEAD = HEAD_PREFIX.partition(".")[0] + "."
#: What a base's folder needs besides its shards: configuration, tokenizer, licence.
_SMALL_FILES = (
    "*.json",
    "*.txt",
    "*.jinja",
    "*.yaml",
    "*.md",
    "*.model",
    "LICENSE*",
    "NOTICE*",
    "*.py",
)
_CHECKED = "checked.json"


@dataclass(frozen=True)
class FetchedModels:
    """The folders of the two checkpoints."""

    base: Path
    upstream: Path


@dataclass(frozen=True)
class Source:
    """What is needed of one checkpoint, known before its shards are there."""

    given: str  # as the recipe has it
    folder: Path | None  # where it is, for one that is no hub id
    repository: Repository | None
    sizes: Mapping[str, int]  # of the files that are needed, in bytes
    config: Mapping[str, Any]

    @property
    def bytes_to_download(self) -> int:
        """Return what the hub's cache lacks."""
        return self.repository.missing_bytes(list(self.sizes)) if self.repository else 0


def is_folder(source: str) -> bool:
    """Return whether a recipe's source is a folder rather than a hub id."""
    return source.startswith(("/", ".", "~"))


def survey(model: ModelSection) -> tuple[Source, Source]:
    """Return what base and upstream are and what of them is needed, fetching small files only.

    Raises GraftError for what is not there, or is no checkpoint.
    """
    base = _survey(model.base, model.base_revision, head_only=False)
    return base, _survey(model.upstream, model.upstream_revision, head_only=True)


def fetch(model: ModelSection, out: Path, report: Progress) -> FetchedModels:
    """Return the folders of base and upstream, downloading what is on the hub.

    What an earlier call fetched is taken from `out/report.json`, without asking the hub again.
    Raises GraftError if one cannot be had or its bytes are wrong, if the upstream index lists no
    head, and if the cache's disk has no room.
    """
    if (known := already_fetched(out, model)) is not None:
        return known
    if is_folder(model.base) and is_folder(model.upstream):
        folders = [_existing(model.base), _existing(model.upstream)]
        commits: list[str | None] = [None, None]
    else:
        sources = survey(model)
        check_cache_room(sources)
        folders = [_fetch(source, out, report) for source in sources]
        commits = [s.repository.commit if s.repository else None for s in sources]
    out.mkdir(parents=True, exist_ok=True)
    result = {"base": str(folders[0]), "upstream": str(folders[1])}
    result_commits = {"base_commit": commits[0], "upstream_commit": commits[1]}
    if is_first_rank():  # of torchrun's, which all come here at once
        write_json({**result, **result_commits, "model": asdict(model)}, out / REPORT_NAME)
    return FetchedModels(*folders)


@contextmanager
def headers_of(source: Source) -> Iterator[Path]:
    """Yield a folder to read a source's config, index and shard headers from.

    For one on the hub it is a temporary folder in which shards that the cache lacks have a header
    and no values. A GraftError inside names the hub id in the folder's place.
    """
    if source.repository is None:
        assert source.folder is not None, "a source is a folder or on the hub"
        yield source.folder
        return
    with TemporaryDirectory(prefix="mtp-graft-") as name:
        folder = Path(name)
        read_headers(source.repository, list(source.sizes), folder)
        try:
            yield folder
        except GraftError as error:
            said = str(error).replace(str(folder), source.given)
            raise type(error)(said) from error


def check_cache_room(sources: tuple[Source, Source]) -> None:
    """Raise GraftError if the hub's cache has no room for what is to be downloaded."""
    needed = sum(source.bytes_to_download for source in sources)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(nearest_folder(cache)).free
    if needed > free:
        raise GraftError(
            f"{cache}: {free:,} bytes free, {needed:,} needed to download "
            f"{' and '.join(s.given for s in sources if s.bytes_to_download)}; make room, or set "
            "HF_HOME to a larger disk"
        )


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists: on whose disk it will be."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def already_fetched(out: Path, model: ModelSection) -> FetchedModels | None:
    """Return the folders of an earlier call for the same model, if they are still there."""
    try:
        found = json.loads((out / REPORT_NAME).read_text())
    except (OSError, ValueError):
        return None
    folders = FetchedModels(Path(found["base"]), Path(found["upstream"]))
    there = folders.base.is_dir() and folders.upstream.is_dir()
    return folders if there and found["model"] == asdict(model) else None


# What is needed


def _survey(source: str, revision: str | None, *, head_only: bool) -> Source:
    if is_folder(source):
        return _survey_folder(_existing(source), source, head_only=head_only)
    repository = read_repository(source, revision)
    weight_map = read_weight_map(fetch_small(repository, INDEX_NAME))
    config = read_object(fetch_small(repository, "config.json"), "a model config")
    names = _needed(source, weight_map, list(repository.files), head_only=head_only)
    if absent := [name for name in names if name not in repository.files]:
        raise GraftError(
            f"{source}: its index names {absent[0]} ({len(absent)} in all), which is not in the "
            f"repository at {repository.commit}; choose another revision"
        )
    sizes = {name: repository.files[name].size for name in names}
    return Source(source, None, repository, sizes, config)


def _survey_folder(folder: Path, source: str, *, head_only: bool) -> Source:
    files = [path.name for path in folder.iterdir() if path.is_file()]
    weight_map = read_index(folder, _HEAD if head_only else "")
    names = _needed(source, weight_map, files, head_only=head_only)
    sizes = {n: (folder / n).stat().st_size for n in names if (folder / n).is_file()}
    return Source(
        source, folder, None, sizes, read_object(folder / "config.json", "a model config")
    )


def _needed(
    source: str, weight_map: Mapping[str, str], files: list[str], *, head_only: bool
) -> list[str]:
    if not head_only:
        small = [n for n in files if any(fnmatch(n, pattern) for pattern in _SMALL_FILES)]
        return sorted({*small, INDEX_NAME, "config.json", *weight_map.values()})
    shards = sorted({shard for name, shard in weight_map.items() if name.startswith(_HEAD)})
    if not shards:
        raise GraftError(
            f"{source}: its index lists no {_HEAD}* tensor; expected the upstream master, "
            "deepseek-ai/DeepSeek-V4-Flash"
        )
    return [INDEX_NAME, "config.json", *shards]


def _existing(source: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise GraftError(f"{folder}: not a folder; expected a checkpoint or a hub id owner/name")
    return folder


# Getting it


def _fetch(source: Source, out: Path, report: Progress) -> Path:
    """Return a source's folder, downloaded and with every large file's hash compared."""
    if source.repository is None:
        assert source.folder is not None, "a source is a folder or on the hub"
        return source.folder
    total = source.bytes_to_download
    done, lock = 0, Lock()

    def on_bytes(came: int) -> None:
        nonlocal done
        with lock:
            done += came
            report(f"fetch: {source.given}", done, total)

    report(f"fetch: {source.given}", 0, total)
    fetched = {name for name in source.sizes if source.repository.cached(name) is None}
    folder = download(source.repository, list(source.sizes), on_bytes)
    for file in (source.repository.files[name] for name in source.sizes):
        if file.sha256 is not None and file.name not in fetched:
            report(f"fetch: check {file.name}", 0, 0)
            _check_once(folder, file, out)
    return folder


def _check_once(folder: Path, file: HubFile, out: Path) -> None:
    """Compare a file that the cache had already with the hub's hash, once for every run."""
    path = folder / file.name
    state = [path.stat().st_size, path.stat().st_mtime_ns]
    record = out / _CHECKED
    checked = json.loads(record.read_text()) if record.exists() else {}
    if checked.get(file.sha256) == state:
        return
    found = sha256(path)
    if found != file.sha256:
        raise GraftError(
            f"{path.resolve()}: sha256 is {found}, expected {file.sha256} by the hub, for "
            f"{file.name}; remove it and fetch again"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json({**checked, str(file.sha256): state}, record)
