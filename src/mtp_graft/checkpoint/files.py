"""Files that are read whole: JSON, with an error for people where it is damaged, and hashes."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mtp_graft.errors import GraftError, in_words


def read_object(path: Path, what: str, cure: str = "") -> dict[str, Any]:
    """Return the JSON object in a file that should be `what`, such as "a model config".

    Raises GraftError, which ends with the `cure`, for a file that is missing, unreadable, no JSON
    or no object.
    """
    cure = cure and f"; {cure}"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise GraftError(f"{path}: not found; expected {what}{cure}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise GraftError(f"{path}: not {what} ({in_words(error)}){cure}") from error
    if not isinstance(found, dict):
        raise GraftError(f"{path}: not {what} (JSON, but no object){cure}")
    return found


class _Index(BaseModel):
    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None


def read_weight_map(path: Path) -> dict[str, str]:
    """Return an index file's weight map, tensor name to shard file name.

    The shards need not be there. Raises GraftError as `read_object` does, and for an index without
    a weight map or with a shard that is no file's name: engines look in the folder alone.
    """
    try:
        weight_map = _Index.model_validate(read_object(path, "a safetensors index")).weight_map
    except ValidationError as error:
        raise GraftError(
            f"{path}: not a safetensors index ({in_words(error)}); fetch again"
        ) from error
    for name, shard in weight_map.items():
        if Path(shard).name != shard:
            raise GraftError(f"{path}: the shard of {name} is {shard!r}, expected a file's name")
    return weight_map


def sha256(path: Path) -> str:
    """Return the SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
