"""Prompts, and files of them: one JSON object a line, `{"id": ..., "text": ...}`."""

import json
from dataclasses import dataclass
from pathlib import Path

from mtp_graft.errors import GraftError, in_words


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and the name that results give it."""

    id: str
    text: str


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation whose next answer is asked for, to be encoded by the server."""

    id: str
    messages: tuple[dict[str, str], ...]  # `role` and `content` each


def load_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Return the first `limit` prompts of a JSON Lines file (all by default).

    Raises GraftError, with the line number, for a missing file, a line that is no prompt, an
    id that comes twice and a file without prompts.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GraftError(f"{path}: not readable ({error}); expected prompts") from error
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _parse(line, where=f"{path}:{number}")
        if prompt.id in prompts:
            raise GraftError(f"{path}:{number}: id {prompt.id!r} comes twice")
        prompts[prompt.id] = prompt
    if not prompts:
        raise GraftError(f'{path}: no prompts; expected lines {{"id": ..., "text": ...}}')
    return list(prompts.values())[:limit]


def _parse(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
        prompt = Prompt(str(row["id"]), str(row["text"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise GraftError(
            f'{where}: not a prompt ({in_words(error)}); expected {{"id": ..., "text": ...}}'
        ) from error
    if not prompt.text:
        raise GraftError(f"{where}: prompt {prompt.id!r} is empty")
    return prompt
