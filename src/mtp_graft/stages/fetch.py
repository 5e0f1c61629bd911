"""Fetch: a checkpoint by its folder or its hub id, as a folder to read from.

The hub's own cache keeps what was downloaded and goes on with what was cut off. Of the upstream
master only the shards that hold the head are fetched: one file of 46 for DeepSeek-V4-Flash.
"""

import json
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.dsv4.names import HEAD_PREFIX
from mtp_graft.errors import GraftError

#: Everything that a base's folder needs; weights of other frameworks stay where they are.
_BASE_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.yaml", "*.md", "*.model"]


def is_folder(source: str) -> bool:
    """Return whether a recipe's source is a folder rather than a hub id."""
    return source.startswith(("/", ".", "~"))


def fetch_base(source: str, revision: str | None = None) -> Path:
    """Return the folder of a whole checkpoint; raises GraftError if it cannot be had."""
    if is_folder(source):
        return _existing(source)
    return _download(
        source,
        lambda: snapshot_download(source, revision=revision, allow_patterns=_BASE_FILES),
    )


def fetch_head(source: str, revision: str | None = None) -> Path:
    """Return a folder with the index and the shards that hold `mtp.*`.

    Raises GraftError if it cannot be had, or if the index lists no such tensor.
    """
    if is_folder(source):
        return _existing(source)
    index = _download(source, lambda: hf_hub_download(source, INDEX_NAME, revision=revision))
    head = HEAD_PREFIX.partition(".")[0] + "."
    shards = sorted({shard for name, shard in _weight_map(index).items() if name.startswith(head)})
    if not shards:
        raise GraftError(
            f"{source}: its index lists no {head}* tensor; expected the upstream master, "
            "deepseek-ai/DeepSeek-V4-Flash"
        )
    files = [INDEX_NAME, "config.json", *shards]
    return _download(
        source, lambda: snapshot_download(source, revision=revision, allow_patterns=files)
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name to shard; unlike `read_index`, before the shards are there."""
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise GraftError(f"{index}: not a safetensors index ({error!r})") from error


def _existing(source: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise GraftError(f"{folder}: not a folder; expected a checkpoint or a hub id owner/name")
    return folder


def _download(source: str, download: Callable[[], str]) -> Path:
    try:
        return Path(download())
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GraftError(
            f"{source}: cannot be fetched from the hub ({first}); check the id and the network, "
            "or name a local folder"
        ) from error
