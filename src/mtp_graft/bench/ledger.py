"""What a benchmark has measured so far, one line a unit, so that a killed client can go on."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mtp_graft.checkpoint.manifest import claim_folder
from mtp_graft.errors import GraftError, in_words

LEDGER_NAME = "units.jsonl"


class Ledger:
    """Finished units by name; with a file, each is on the disk before the next is begun."""

    def __init__(
        self, file: BinaryIO | None = None, units: Mapping[str, Any] | None = None
    ) -> None:
        self._file = file
        self._units = dict(units or {})
        self.has_grown = False  # since it was opened

    def __contains__(self, name: str) -> bool:
        return name in self._units

    def __getitem__(self, name: str) -> Any:
        return self._units[name]

    def values(self) -> list[Any]:
        """Return all finished units."""
        return list(self._units.values())

    def add(self, name: str, unit: Any) -> None:
        """Keep a finished unit; a name is given once."""
        assert name not in self._units, name
        self._units[name] = unit
        self.has_grown = True
        if self._file is not None:
            self._file.write(json.dumps({"unit": name, "value": unit}).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def open_ledger(folder: Path | None, config: Mapping[str, Any]) -> Iterator[Ledger]:
    """Yield the ledger of a benchmark in `folder`; None keeps it in memory.

    `config` is all that decides what is measured. Raises GraftError if the folder was begun with
    another one, or if another process measures into it.
    """
    if folder is None:
        yield Ledger()
        return
    claim_folder(folder, config)
    path = folder / LEDGER_NAME
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GraftError(f"{path}: another benchmark writes into this run folder") from None
        yield Ledger(file, _read(path, file))


def _read(path: Path, file: BinaryIO) -> dict[str, Any]:
    """Return the whole lines; half a line at the end is what a kill left, and is cut off."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        file.truncate(len(whole))
    units = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            units[row["unit"]] = row["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise GraftError(
                f"{path}:{number}: not a measured unit ({in_words(error)}); remove {path.parent}"
            ) from error
    return units
