"""The hub, through huggingface_hub: snapshots in its cache, and shard headers before a download.

A snapshot is a folder of the hub's own cache. What is there is not asked for again; with all files
there no network is needed, whether a commit or a branch is named.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from mtp_graft.checkpoint.files import is_full_disk, sha256
from mtp_graft.errors import GraftError

#: Whatever asking the hub can raise: its client's own base class (requests', httpx' or httpx2', by
#: the version), and RuntimeError of hf_xet.
HUB_ERRORS: tuple[type[Exception], ...] = (
    errors.HTTPError,  # type: ignore[attr-defined]
    errors.SafetensorsParsingError,
    OSError,
    ValueError,
    RuntimeError,
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AT_ONCE = 4

OnBytes = Callable[[int], None]  # so many bytes are here by now


def snapshot(
    repo: str, revision: str | None, patterns: Sequence[str], on_bytes: OnBytes = lambda _: None
) -> Path:
    """Return the cached snapshot of a model, named by its commit, with all files of `patterns`.

    Raises GraftError if the cache lacks one and it cannot be fetched.
    """
    with hub_errors(repo):
        found = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            max_workers=_AT_ONCE,
            tqdm_class=_reporting(on_bytes),
        )
    return Path(found)


def _reporting(on_bytes: OnBytes) -> type[tqdm]:
    """Return a class for huggingface_hub's progress bars that draws none and reports the bytes."""

    class Bar(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes:
                on_bytes(int(self.n))

    return Bar


def file_sizes(repo: str, commit: str) -> dict[str, int]:
    """Ask the hub for the files of a model at a commit; return name -> bytes."""
    with hub_errors(repo):
        entries = list(HfApi().list_repo_tree(repo, revision=commit, recursive=True))
    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def write_headers(repo: str, commit: str, shards: Sequence[str], folder: Path) -> None:
    """Write files into `folder` with the shards' names, headers and sizes, but without values.

    Raises GraftError for a shard that is no safetensors file.
    """

    def write(name: str) -> None:
        with hub_errors(f"{repo}/{name}"):
            found = HfApi().parse_safetensors_file_metadata(repo, name, revision=commit)
        header = {
            tensor: {"dtype": i.dtype, "shape": i.shape, "data_offsets": list(i.data_offsets)}
            for tensor, i in found.tensors.items()
        }
        text = json.dumps(header).encode()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        end = max((i.data_offsets[1] for i in found.tensors.values()), default=0)
        os.truncate(path, 8 + len(text) + end)  # a hole, which takes no disk

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(write, shards))


def check_hashes(
    snapshot: Path, names: Sequence[str], report: Callable[[str, int, int], None]
) -> None:
    """Compare large files with the SHA-256 by which the hub announced them.

    It is the name under which the cache has their bytes. Raises GraftError for another one, and
    removes that file, so that it can be fetched anew.
    """
    blobs = [(name, (snapshot / name).resolve()) for name in names]
    large = [(name, blob) for name, blob in blobs if _SHA256.fullmatch(blob.name)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        hashes = pool.map(lambda file: sha256(file[1]), large)
        for number, ((name, blob), found) in enumerate(zip(large, hashes, strict=True), start=1):
            report(f"fetch: check {name}", number, len(large))
            if found != blob.name:
                blob.unlink()
                raise GraftError(
                    f"{blob}: sha256 is {found}, expected {blob.name} by the hub, for {name}; it "
                    "is removed: run again to fetch it anew"
                )


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
