"""Where calibration and evaluation prompts come from: a JSON Lines file, or a chat data set.

A row is `{"id": ..., "text": ...}` with a text that is already chat-encoded, or, as in
HuggingFaceH4/ultrachat_200k, `{"prompt_id": ..., "messages": [{"role": ..., "content": ...}]}`.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from mtp_graft.errors import GraftError, in_words
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.prompts import ChatPrompt, Prompt

logger = logging.getLogger(__name__)

HUB = "hub:"
DEFAULT_SPLIT = "train_sft"  # ultrachat_200k's, for supervised fine-tuning
_INSTALL = "pip install pyarrow, or name a JSON Lines file"


def load_calibration(
    source: str | Path, count: int | None = None, skip: int = 0
) -> list[Prompt | ChatPrompt]:
    """Return `count` prompts of `source` (None: all) after the first `skip`.

    `source` is a JSON Lines or Parquet file, or `hub:owner/dataset[:split]`. Of a conversation,
    everything up to its last user turn is the prompt.

    Raises GraftError as `iterate_prompts` does, and for too few rows.
    """
    last = None if count is None else skip + count
    prompts = list(islice(iterate_prompts(source), skip, last))
    if not prompts or (count is not None and len(prompts) < count):
        raise GraftError(
            f"{source}: {len(prompts)} prompts after the first {skip}, expected "
            f"{count or 'some'}; ask for fewer"
        )
    return prompts


def iterate_prompts(source: str | Path) -> Iterator[Prompt | ChatPrompt]:
    """Yield the prompts of `source` in order, reading no more of it than is asked for.

    Raises GraftError for a source that cannot be read, a row that is no prompt and an id that
    comes twice.
    """
    name = str(source)
    rows = _hub_rows(name.removeprefix(HUB)) if name.startswith(HUB) else _file_rows(Path(name))
    seen: set[str] = set()
    for number, row in rows:
        prompt = _parse(row, where=f"{name}:{number}")
        if prompt.id in seen:
            raise GraftError(f"{name}:{number}: id {prompt.id!r} comes twice")
        seen.add(prompt.id)
        yield prompt


@dataclass(frozen=True)
class Encoded:
    """A prompt as the server's tokens."""

    prompt: Prompt | ChatPrompt
    token_ids: tuple[int, ...]


def take_fitting(
    client: ServerClient,
    prompts: Iterator[Prompt | ChatPrompt],
    count: int,
    max_tokens: int,
    what_for: str,
) -> tuple[list[Encoded], list[Encoded]]:
    """Take from `prompts` until `count` have at most `max_tokens` tokens; return these, and others.

    The others are left out: they are named in a warning, or in the GraftError that is raised if
    `prompts` end before there are `count`.
    """
    taken: list[Encoded] = []
    dropped: list[Encoded] = []
    while len(taken) < count and (prompt := next(prompts, None)) is not None:
        encoded = Encoded(prompt, tuple(client.encode(prompt)))
        (taken if len(encoded.token_ids) <= max_tokens else dropped).append(encoded)
    names = ", ".join(f"{each.prompt.id} ({len(each.token_ids)})" for each in dropped)
    too_long = f"with more than {max_tokens} tokens, left out: {names or 'none'}"
    if len(taken) < count:
        raise GraftError(
            f"{len(taken)} prompts for {what_for}, expected {count}; {too_long}; allow longer "
            "prompts, or ask for fewer"
        )
    if dropped:
        logger.warning("prompts for %s %s", what_for, too_long)
    return taken, dropped


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, row)."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GraftError(f"{path}: not readable ({error}); expected prompts") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise GraftError(f"{path}:{number}: {in_words(error)}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        arrow, parquet = map(import_module, ("pyarrow", "pyarrow.parquet"))
    except ImportError as error:
        raise GraftError(f"{path}: pyarrow is not installed; {_INSTALL}") from error
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=256)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (arrow.ArrowException, OSError) as error:
        raise GraftError(f"{path}: not a readable Parquet file ({error})") from error


def _hub_rows(name: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of the split's files, fetched when they are reached."""
    from huggingface_hub import HfApi, hf_hub_download

    from mtp_graft.stages.hub import HUB_ERRORS

    repo, _, split = name.partition(":")
    split = split or DEFAULT_SPLIT
    number = 0
    try:
        listed = HfApi().list_repo_files(repo, repo_type="dataset")
        for file in _split_files(listed, split, where=HUB + name):
            path = Path(hf_hub_download(repo, file, repo_type="dataset"))
            for _, row in _parquet_rows(path):
                number += 1
                yield number, row
    except HUB_ERRORS as error:
        raise GraftError(f"{HUB}{name}: not available ({error}); {_INSTALL}") from error


def _split_files(files: Iterable[str], split: str, where: str) -> list[str]:
    """Return the Parquet files of `split`, in order; they are called `data/SPLIT-NNNNN-...`."""
    parquet = sorted(file for file in files if file.endswith(".parquet"))
    chosen = [file for file in parquet if Path(file).name.startswith(f"{split}-")]
    if not chosen:
        found = sorted({Path(file).name.partition("-")[0] for file in parquet})
        raise GraftError(f"{where}: no Parquet files of split {split!r}, found {found}")
    return chosen


def _parse(row: Any, where: str) -> Prompt | ChatPrompt:
    expected = 'expected {"id", "text"} or {"prompt_id", "messages"}'
    try:
        if "messages" not in row:
            prompt: Prompt | ChatPrompt = Prompt(str(row["id"]), str(row["text"]))
            empty = not row["text"]
        else:
            prompt = ChatPrompt(str(row["prompt_id"]), _asked(row["messages"]))
            empty = not prompt.messages
    except (KeyError, TypeError) as error:
        raise GraftError(f"{where}: not a prompt ({in_words(error)}); {expected}") from error
    if empty:
        raise GraftError(f"{where}: prompt {prompt.id!r} asks nothing; {expected}")
    return prompt


def _asked(messages: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], ...]:
    """Return the conversation up to its last user turn."""
    turns = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return tuple(turns)
