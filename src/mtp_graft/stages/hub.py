"""Files of a hub repository, in the hub's own cache: resumed after a kill, and never unchecked.

Large files are downloaded here rather than by huggingface_hub, which (2.4) begins a file anew after
its process was killed and does not compare hashes. They get their place in the cache, which is
laid out as the hub documents it (`models--OWNER--NAME/blobs/SHA256`), when the hash is right.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants, errors, hf_hub_download, hf_hub_url
from huggingface_hub import try_to_load_from_cache as find_cached
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from mtp_graft.checkpoint.files import sha256
from mtp_graft.checkpoint.shards import is_full_disk
from mtp_graft.errors import GraftError
from mtp_graft.serving.concurrent import concurrently

#: What a file is called while it is not whole; a later call goes on with it.
PART_SUFFIX = ".mtp-graft-part"
_FILES_AT_ONCE = 4
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_OK, _PARTIAL = 200, 206
_MOST_HEADER_BYTES = 100_000_000  # which safetensors itself allows

#: Whatever asking the hub can raise. Its client speaks through requests, httpx or httpx2, by its
#: version, and its `HTTPError` is the base class of whichever that is; hf_xet has RuntimeError.
HUB_ERRORS: tuple[type[Exception], ...] = (
    httpx.HTTPError,
    httpx.InvalidURL,
    errors.HTTPError,  # type: ignore[attr-defined]
    OSError,
    ValueError,
    RuntimeError,
)

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class HubFile:
    """One file of a repository."""

    name: str
    size: int
    sha256: str | None  # of files in large file storage; small ones are in git


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit."""

    id: str
    commit: str
    files: Mapping[str, HubFile]

    def cached(self, name: str) -> Path | None:
        """Return where the hub's cache has a file, if it has."""
        found = find_cached(self.id, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def blob(self, file: HubFile) -> Path:
        """Return where the hub's cache has, or will have, the bytes of a large file."""
        folder = "--".join(["models", *self.id.split("/")])
        return Path(constants.HF_HUB_CACHE) / folder / "blobs" / str(file.sha256)

    def missing_bytes(self, names: Sequence[str]) -> int:
        """Return how many bytes of these files are not in the cache, whole or in part."""
        missing = 0
        for file in (self.files[name] for name in names):
            if self.cached(file.name) is not None:
                continue
            missing += file.size
            if file.sha256 is not None:
                missing -= min(_size(self.blob(file)) or _size(_part(self.blob(file))), file.size)
        return missing


def read_repository(repo: str, revision: str | None) -> Repository:
    """Ask the hub what a model repository has; raises GraftError if it does not say."""
    with hub_errors(repo):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = [
        HubFile(s.rfilename, s.size or 0, None if s.lfs is None else s.lfs.sha256)
        for s in info.siblings or ()
    ]
    if info.sha is None or not files:
        raise GraftError(f"{repo}: the hub names no commit or no files; expected a model")
    return Repository(repo, info.sha, {file.name: file for file in files})


def fetch_small(repository: Repository, name: str) -> Path:
    """Return a file that is in git, or whose bytes are in the cache already.

    Raises GraftError if the repository does not have it, or it cannot be fetched.
    """
    if name not in repository.files:
        raise GraftError(f"{repository.id}: has no {name}; expected a whole checkpoint")
    if (found := repository.cached(name)) is not None:
        return found
    with hub_errors(repository.id):
        return Path(hf_hub_download(repository.id, name, revision=repository.commit))


def read_headers(repository: Repository, names: Sequence[str], folder: Path) -> None:
    """Put a stand-in for each shard into `folder`: of the right size, its header and no values.

    Files that are small or in the cache are linked; other small files are left out. Raises
    GraftError for a shard that is no safetensors file.
    """

    def read(name: str) -> None:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (cached := repository.cached(name)) is not None:
            place.symlink_to(cached)
        elif name.endswith(".safetensors"):
            place.write_bytes(_read_header(repository, name))
            os.truncate(place, repository.files[name].size)  # the rest takes no disk

    for _ in concurrently(read, names, _FILES_AT_ONCE):
        pass


def download(repository: Repository, names: Sequence[str], on_bytes: OnBytes) -> Path:
    """Return the folder in the hub's cache that has these files, fetching those it lacks.

    `on_bytes` is told how many bytes came. Raises GraftError for a file that cannot be fetched,
    whose bytes are not those that the hub announced, and for a full disk.
    """

    def fetch(name: str) -> Path:
        file = repository.files[name]
        if file.sha256 is not None and repository.cached(name) is None:
            _fetch_blob(repository, file, on_bytes)
        return fetch_small(repository, name)  # finds the bytes, and gives them their name

    folder = {path.parents[len(Path(name).parts) - 1] for name, path in _each(fetch, names)}
    assert len(folder) == 1, "files of one commit are in one folder"
    return folder.pop()


def _each(fetch: Callable[[str], Path], names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    return concurrently(lambda name: (name, fetch(name)), names, _FILES_AT_ONCE)


def _fetch_blob(repository: Repository, file: HubFile, on_bytes: OnBytes) -> None:
    """Put a large file's bytes into the cache, going on with those that are there."""
    blob = repository.blob(file)
    if blob.exists():
        return
    part = _part(blob)
    with hub_errors(f"{repository.id}/{file.name}"):
        part.parent.mkdir(parents=True, exist_ok=True)
        if _size(part) < file.size:
            _append(repository, file, part, on_bytes)
        if _size(part) < file.size:
            raise GraftError(
                f"{repository.id}/{file.name}: ended at {_size(part):,} of {file.size:,} bytes; "
                "run again to go on from there"
            )
        found = sha256(part)
        if found != file.sha256:
            part.unlink()
            raise GraftError(
                f"{repository.id}/{file.name}: sha256 is {found}, expected {file.sha256} by the "
                "hub; what came is removed: run again to fetch it anew"
            )
        part.rename(blob)


def _append(repository: Repository, file: HubFile, part: Path, on_bytes: OnBytes) -> None:
    """Download what `part` lacks; what came before an error stays."""
    url = hf_hub_url(repository.id, file.name, revision=repository.commit)
    # The bytes as they are: a compressed answer could not be gone on with.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start := _size(part):
        headers["Range"] = f"bytes={start}-"
    with (
        httpx.Client(follow_redirects=True, timeout=_TIMEOUT) as client,
        client.stream("GET", url, headers=headers) as answer,
    ):
        if answer.status_code not in (_OK, _PARTIAL):
            raise GraftError(f"{url}: status {answer.status_code}, expected {_OK}; fetch again")
        # A server that sends all of it anew says so.
        with part.open("ab" if answer.status_code == _PARTIAL else "wb") as out:
            for chunk in answer.iter_raw():
                out.write(chunk)
                on_bytes(len(chunk))
            out.flush()
            os.fsync(out.fileno())


def _read_header(repository: Repository, name: str) -> bytes:
    """Return the first bytes of a shard: the header's size, and the header."""
    start = _read_first(repository, name, 8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > min(_MOST_HEADER_BYTES, repository.files[name].size - 8):
        raise GraftError(
            f"{repository.id}/{name}: no safetensors file (its header is to have {size:,} bytes); "
            "choose another revision"
        )
    return _read_first(repository, name, 8 + size)


def _read_first(repository: Repository, name: str, num_bytes: int) -> bytes:
    url, found = hf_hub_url(repository.id, name, revision=repository.commit), b""
    headers = {"Accept-Encoding": "identity", "Range": f"bytes=0-{num_bytes - 1}"}
    with (
        hub_errors(f"{repository.id}/{name}"),
        httpx.Client(follow_redirects=True, timeout=_TIMEOUT) as client,
        client.stream("GET", url, headers={**build_hf_headers(), **headers}) as answer,
    ):
        answer.raise_for_status()
        for chunk in answer.iter_raw():  # a server that knows no ranges is not read to its end
            found += chunk
            if len(found) >= num_bytes:
                break
    return found[:num_bytes]


def _part(blob: Path) -> Path:
    return blob.with_name(blob.name + PART_SUFFIX)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn whatever asking the hub can raise into one GraftError."""
    try:
        yield
    except HUB_ERRORS as error:
        if isinstance(error, OSError) and is_full_disk(error):
            raise GraftError(
                f"{what}: the disk of {constants.HF_HUB_CACHE} is full; make room or set HF_HOME "
                "to another, and run again to go on"
            ) from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GraftError(
            f"{what}: cannot be fetched from the hub ({first}); check the id and the network, "
            "or name a local folder; run again to go on"
        ) from error
