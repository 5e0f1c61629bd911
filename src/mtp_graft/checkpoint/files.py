"""Files that are read or written whole: JSON, with an error for people, text, and hashes."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter

from mtp_graft.errors import GraftError, translated

T = TypeVar("T")
#: What `mtp-graft tune` found of the checkpoint that it lies in, on one machine: never copied.
TUNED_NAME = "mtp-graft-tuned.json"


def read_object(path: Path, what: str, cure: str = "") -> dict[str, Any]:
    """Return the JSON object in a file that should be `what`, such as "a model config"."""
    return read_as(dict[str, Any], path, what, cure)


def read_as(schema: type[T], path: Path, what: str, cure: str = "") -> T:
    """Return a JSON file by a pydantic `schema`; GraftError, which ends with the `cure`, if not."""
    cure = cure and f"; {cure}"
    if not path.is_file():
        raise GraftError(f"{path}: not found; expected {what}{cure}")
    with translated(f"{path}: not {what}", OSError, ValueError, then=cure):
        return TypeAdapter(schema).validate_json(fetched(path.read_bytes()))


def fetched(data: bytes) -> bytes:
    """Return the start of a file's bytes; raises ValueError for none and for a git-lfs pointer."""
    if not data or data.startswith(b"version https://git-lfs"):
        raise ValueError("a git-lfs pointer: run `git lfs pull`" if data else "no file, or empty")
    return data


def visible_files(folder: Path) -> dict[str, Path]:
    """Return a folder's files by relative name, without TUNED_NAME and hidden files or folders."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if path.is_file() and not any(part.startswith((".", TUNED_NAME)) for part in name.parts)
    }


def sha256(path: Path) -> str:
    """Return the SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(value: object, path: Path) -> None:
    """Write JSON under a temporary name, sync it and rename it into place."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text file under a temporary name, sync it and rename it into place."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # as JSON escapes a name's bytes


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a temporary file, synced and renamed to `path` after the body; nothing if that fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with full_disk_is_an_error(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `path` likewise."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a call that was killed
    try:
        with full_disk_is_an_error(path):
            temporary.mkdir(parents=True)
            yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # must not hide what went wrong
        raise


@contextmanager
def full_disk_is_an_error(path: Path) -> Iterator[None]:
    """Raise GraftError if the body runs out of space or quota while it writes `path`."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise GraftError(f"{path}: the disk is full; make room and run again") from error


def is_full_disk(error: OSError) -> bool:
    """Say whether a failed write ran out of space or quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
