"""Traces of a card, read anew."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtp_graft.bench.card.cite import SIZE_POINTER
from mtp_graft.bench.card.styles import STYLES
from mtp_graft.serving.profiles import PROFILES
from run_folder import ROOT


def traced(run: Path) -> list[dict[str, Any]]:
    """Return every number of a run's card, and where it is from."""
    found: list[dict[str, Any]] = json.loads((run / "card/card.json").read_text())["numbers"]
    return found


def reread(entry: Mapping[str, Any], run: Path, sizes: Mapping[str, int] | None = None) -> str:
    """Return what the card has to show for a number; `sizes` are those of files not there."""
    values = [resolve(run, origin, sizes or {}) for origin in entry["from"]]
    return STYLES[entry["style"]].write(*values)


def resolve(run: Path, origin: Mapping[str, str], sizes: Mapping[str, int]) -> Any:
    """Return the value that a trace points to (RFC 6901)."""
    file, pointer = origin["file"], origin["pointer"]
    if pointer == SIZE_POINTER:
        return sizes[file] if file in sizes else (run / file).stat().st_size
    if file.startswith("package:"):
        assert (ROOT / "src" / file.removeprefix("package:")).is_file()
        value: Any = {name: asdict(profile) for name, profile in PROFILES.items()}
    else:
        value = json.loads((run / file).read_text())
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value
