"""Fetch: a checkpoint by its folder or its hub id, as a folder to read from.

Of a base, all shards are fetched; of the upstream master those that hold the head, one of 46 for
DeepSeek-V4-Flash; of a head that somebody spliced, that alone. They are a snapshot in the hub's own
cache: with all files there no network is needed, whether a commit or a branch is named.
"""

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import huggingface_hub as hub
import yaml  # type: ignore[import-untyped]
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects, tqdm  # type: ignore[attr-defined]

from mtp_graft.checkpoint.files import is_full_disk, read_object, sha256, visible_files, write_json
from mtp_graft.checkpoint.makers import expect_format
from mtp_graft.checkpoint.manifest import read_result
from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD, MANIFEST_NAME
from mtp_graft.checkpoint.shards import INDEX_NAME, read_weight_map
from mtp_graft.errors import GraftError
from mtp_graft.recipe import ModelSection
from mtp_graft.stages.inputs import REPORT_NAME, Progress

logger = logging.getLogger(__name__)

#: Whatever asking the hub can raise: its client's base class, and RuntimeError of hf_xet.
HUB_ERRORS: tuple[type[Exception], ...] = (
    errors.HTTPError,  # type: ignore[attr-defined]
    errors.SafetensorsParsingError,
    *(OSError, ValueError, RuntimeError, TypeError, KeyError),  # a proxy may answer other JSON
)
_HEAD = "mtp."
#: What is needed besides shards: of a base configuration, tokenizer, licence.
_BESIDE_SHARDS = {
    "base": ["*.json", "*.txt", "*.jinja", "*.yaml", "*.md", "*.py", "LICENSE*", "NOTICE*"],
    "head": [INDEX_NAME, "config.json", MANIFEST_NAME],
}
#: A release's version, size and date; the first one's name has no date.
_RELEASE = re.compile(
    r"deepseek-(v4[\d.]*)-(flash|pro)(?:-dspark)?(?:-(\d{4})(?!\d))?", re.IGNORECASE
)
_AT_ONCE = 4
#: How long a request waits, a few times, for a hub that is asked too often: three of its windows.
_PATIENCE_S = 900


class HubError(GraftError):
    """The hub cannot be asked, or has no such thing."""


class FetchedModels(NamedTuple):
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


def fetch(model: ModelSection, out: Path, report: Progress) -> FetchedModels:
    """Return the folders of base and upstream, downloading what is on the hub.

    What an earlier call fetched is taken from `out/report.json`, without asking the hub again.
    Raises GraftError if one cannot be had, is wrong or has no head, and for a full disk.
    """
    if (known := already_fetched(out, model)) is not None:
        return known
    base, upstream = sources = find_sources(model)
    folders = FetchedModels(*download(sources, report))
    out.mkdir(parents=True, exist_ok=True)
    found = {"base": str(folders.base), "upstream": str(folders.upstream), "model": asdict(model)}
    commits = {"base_commit": base.commit, "upstream_commit": upstream.commit}
    write_json(found | commits, out / REPORT_NAME)
    return folders


def already_fetched(out: Path, model: ModelSection) -> FetchedModels | None:
    """Return the folders of an earlier call for the same model, if they are still there."""
    if (found := read_result(out / REPORT_NAME)) is None or found["model"] != asdict(model):
        return None
    folders = FetchedModels(Path(found["base"]), Path(found["upstream"]))
    return folders if all(folder.is_dir() for folder in folders) else None


def find_sources(model: ModelSection) -> tuple[Source, Source]:
    """Return what is needed of both, fetching small files; GraftError for what is no checkpoint."""
    base = find_source(model.base, model.base_revision, "base")
    upstream = find_source(model.upstream, model.upstream_revision, "head")
    warn_of_releases(base, upstream)
    return base, upstream


def warn_of_releases(base: Source, upstream: Source) -> None:
    """Warn of a drafter of another release than the base's, where names or cards say so."""
    ours, theirs = _release(base), _release(upstream)
    if None not in (ours, theirs) and ours != theirs:
        pair = f"{base.given} is of {ours}, {upstream.given} of {theirs}"
        logger.warning(
            "%s: a drafter reads what its own release computes; expect few accepted drafts", pair
        )


def _release(source: Source) -> str | None:
    """Return the release that a card's base_model names, else the checkpoint's own name."""
    said, card = None, source.folder / "README.md"
    with suppress(yaml.YAMLError, OSError, ValueError):  # one that cannot be read says nothing
        said = hub.ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model")
    own = source.given.rstrip("/").rpartition("/")[2]
    names = [*(said if isinstance(said, list) else [said]), own]
    found = next(filter(None, (_RELEASE.search(f"{name}") for name in names)), None)
    return found and "-".join(filter(None, ("DeepSeek", *found.groups()))).lower()


def find_source(given: str, revision: str | None, part: Literal["base", "head"]) -> Source:
    """Return what is needed of a folder or a hub id; raises GraftError as `find_sources` does."""
    folder, commit = Path(given).expanduser(), None
    if folder.suffix.lower() == ".gguf":
        expect_format(folder, part)
    if not given.startswith(("/", ".", "~")):
        folder = _snapshot(given, revision, _BESIDE_SHARDS[part])
        commit = folder.name
    elif not folder.is_dir():
        raise GraftError(f"{folder}: not a folder; expected a checkpoint or a hub id owner/name")
    names = _needed_files(given, folder, part)
    config = read_object(folder / "config.json", "a config") if "config.json" in names else {}
    return Source(given, folder, commit, _sizes(given, folder, commit, names), config)


def _needed_files(given: str, folder: Path, part: Literal["base", "head"]) -> set[str]:
    """Return the names of what is needed, by a folder that has at least the small files."""
    if part == "head" and (folder / MANIFEST_NAME).is_file():  # somebody's head, already spliced
        return {MANIFEST_NAME, HEAD_SHARD}
    expect_format(folder, part)
    for name in (INDEX_NAME, "config.json"):
        if not (folder / name).is_file():
            raise GraftError(f"{given}: has no {name}; expected a whole checkpoint")
    weight_map = read_weight_map(folder / INDEX_NAME)
    shards = {s for name, s in weight_map.items() if part == "base" or name.startswith(_HEAD)}
    if not shards:
        expected = "expected the upstream, deepseek-ai/DeepSeek-V4-Flash"
        raise GraftError(f"{given}: its index lists no {_HEAD}* tensor; {expected}")
    patterns = _BESIDE_SHARDS[part]
    return shards | {*filter_repo_objects(visible_files(folder), allow_patterns=patterns)}


def _sizes(given: str, folder: Path, commit: str | None, names: set[str]) -> dict[str, int]:
    """Return the sizes of files that are needed; of those that are not here, by the hub."""
    sizes = {n: (folder / n).stat().st_size for n in sorted(names) if (folder / n).is_file()}
    if len(sizes) < len(names) and commit is not None:
        entries = hub.get_cached_repo_tree(given, revision=commit)  # of the snapshot's small files
        sizes = {e.path: e.size for e in sorted(entries, key=lambda e: e.path) if e.path in names}
    if absent := sorted(names - sizes.keys()):
        where = "" if commit is None else f" at {commit}; choose another revision"
        found = f"has no {absent[0]}, which is needed ({len(absent)} in all)"
        raise GraftError(f"{given}: {found}{where}")
    return sizes


@contextmanager
def headers_of(source: Source) -> Iterator[Path]:
    """Yield a temporary folder to read a source's config, index and shard headers from.

    Shards that are not in the cache have no values. A GraftError inside names the source instead.
    """
    missing = source.missing
    with TemporaryDirectory(prefix="mtp-graft-") as name:
        folder = Path(name)
        for file in source.sizes:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if file not in missing:
                (folder / file).symlink_to((source.folder / file).absolute())
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(partial(_write_header, source, folder), missing))
        try:
            yield folder
        except GraftError as error:
            raise type(error)(str(error).replace(str(folder), source.given)) from error


def _write_header(source: Source, folder: Path, shard: str) -> None:
    """Write a file with a shard's name, header and size, but without values."""
    with hub_errors(f"{source.given}/{shard}"):
        api, commit = hub.HfApi(), source.commit
        found = api.parse_safetensors_file_metadata(source.given, shard, revision=commit)
    text = json.dumps({name: asdict(info) for name, info in found.tensors.items()}).encode()
    (folder / shard).write_bytes(len(text).to_bytes(8, "little") + text)
    end = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
    os.truncate(folder / shard, 8 + len(text) + end)  # a hole, which takes no disk


def download(sources: Sequence[Source], report: Progress) -> list[Path]:
    """Return the sources' folders with all that is needed; large files' hashes are compared."""
    for source in sources:
        if source.missing:
            _download(source, report)
        if source.commit is not None:
            _check_hashes(source, report)
    return [source.folder for source in sources]


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists: on whose disk it will be."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _download(source: Source, report: Progress) -> None:
    done, total = 0, source.bytes_to_download

    def on_bytes(here: int) -> None:  # of two bars, one of which may lag behind
        nonlocal done
        done = max(done, min(here, total))
        report(f"fetch: {source.given}", done, total)

    on_bytes(0)
    _snapshot(source.given, source.commit, list(source.sizes), on_bytes)


def _snapshot(
    repo: str,
    revision: str | None,
    patterns: list[str],
    on_bytes: Callable[[int], None] = lambda _: None,  # so many are here by now
) -> Path:
    """Return the cached snapshot of a model, named by its commit, with all files of `patterns`."""

    class Bar(tqdm):
        """Draws nothing, reports the bytes."""

        def __init__(self, *args: object, **options: object) -> None:
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes:
                on_bytes(int(self.n))

    with hub_errors(repo):
        found = hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, max_workers=_AT_ONCE, tqdm_class=Bar
        )
    return Path(found)


def _check_hashes(source: Source, report: Progress) -> None:
    """Compare large files with the SHA-256 by which the hub announced them.

    It is the name under which the cache has their bytes. Raises GraftError for another one, and
    removes that file, so that it can be fetched anew.
    """
    blobs = {name: (source.folder / name).resolve() for name in source.sizes}
    large = {name: blob for name, blob in blobs.items() if re.fullmatch(r"[0-9a-f]{64}", blob.name)}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        hashes = zip(large.items(), pool.map(sha256, large.values()), strict=True)
        for number, ((name, blob), found) in enumerate(hashes, start=1):
            report(f"fetch: check {name}", number, len(large))
            if found != blob.name:
                blob.unlink()
                expected = f"expected {blob.name} by the hub, for {name}"
                cure = "it is removed: run again to fetch it anew"
                raise GraftError(f"{blob}: sha256 is {found}, {expected}; {cure}")


@contextmanager
def hub_errors(what: str, instead: str = "a local folder") -> Iterator[None]:
    """Wait for a hub that is busy; whatever else asking it for `what` raises is one GraftError."""
    client: Any = hub.get_session()  # which by itself sends some requests once only
    if not isinstance(client.send, partial):
        client.send = partial(_send, client.send)
    try:
        yield
    except HUB_ERRORS as error:
        if isinstance(error, OSError) and is_full_disk(error):
            found = f"the disk of {constants.HF_HUB_CACHE} is full"
            cure = "make room or set HF_HOME to another, and run again to go on"
            raise GraftError(f"{what}: {found}; {cure}") from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        cure = f"check the id and the network, or name {instead}; run again to go on"
        raise HubError(f"{what}: cannot be fetched from the hub ({first}); {cure}") from error


def _asked_wait(headers: Mapping[str, str]) -> int:
    """Return how long a busy hub wants to be left alone: seconds, a date, or its rate's window."""
    asked = headers.get("Retry-After", "")
    if not asked.isdecimal():
        with suppress(ValueError, OverflowError):
            return math.ceil(parsedate_to_datetime(asked).timestamp() - time.time())
        asked = ("0", *re.findall(r"\bt=(\d+)", headers.get("RateLimit", "")))[-1]
    return int(asked[:9])


def _send(send: Callable[..., Any], request: Any, **options: Any) -> Any:
    """Send a request until the hub has time for it; GraftError if it asks for a long wait."""
    for attempt in count():
        response = send(request, **options)
        if response.status_code != 429 or request.method not in ("GET", "HEAD"):
            return response
        response.close()
        wait = max(4**attempt, _asked_wait(response.headers))
        told = f"{request.url.host}: too many requests (429); {wait:,} s to wait"
        if wait > _PATIENCE_S:
            raise GraftError(f"{told}: run again after that, or log in, which allows more")
        logger.warning(told)
        time.sleep(wait)
