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

    Raises GraftError for a missing file, a file without prompts and, with the line number, a line
    that is no prompt, an empty text and an id that comes twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GraftError(f"{path}: not readable ({error}); expected prompts") from error
    expected = 'expected {"id": ..., "text": ...} on each line'
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = Prompt(str(row["id"]), str(row["text"]))
        except (ValueError, KeyError, TypeError) as error:
            problem = f"not a prompt ({in_words(error)}); {expected}"
            raise GraftError(f"{path}:{number}: {problem}") from error
        if not prompt.text or prompt.id in prompts:
            problem = "comes twice" if prompt.text else "is empty"
            raise GraftError(f"{path}:{number}: prompt {prompt.id!r} {problem}")
        prompts[prompt.id] = prompt
    if not prompts:
        raise GraftError(f"{path}: no prompts; {expected}")
    return list(prompts.values())[:limit]
