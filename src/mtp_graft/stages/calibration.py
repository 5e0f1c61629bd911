"""Where calibration and evaluation prompts come from: a JSON Lines file, or a chat data set.

A row is `{"id": ..., "text": ...}` with a text that is already chat-encoded, or, as in
HuggingFaceH4/ultrachat_200k, `{"prompt_id": ..., "messages": [{"role": ..., "content": ...}]}`.
"""

import logging
import math
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, ValidationError
from pydantic_core import from_json

from mtp_graft.checkpoint.files import fetched
from mtp_graft.errors import GraftError, translated
from mtp_graft.serving.client import Prompt, ServerClient

HUB = "hub:"
_EXPECTED = 'expected {"id", "text"} or {"prompt_id", "messages"}'
EncodedPrompts = dict[str, tuple[int, ...]]  # a prompt's id -> the server's tokens of it


class _Turn(BaseModel):
    role: str
    content: str


class _Row(BaseModel):
    id: str = Field(validation_alias=AliasChoices("prompt_id", "id"), coerce_numbers_to_str=True)
    text: str | None = None
    messages: list[_Turn] | None = None


def take_fitting(
    client: ServerClient,
    prompts: Iterator[Prompt],
    count: int,
    max_tokens: int,
    what_for: str,
    most: int | None = None,
    new_tokens: int = 0,
) -> tuple[EncodedPrompts, EncodedPrompts]:
    """Take from `prompts` until `count` have at most `max_tokens` tokens; return these, and others.

    Fewer will do where they, with `new_tokens` each, make `most` tokens. The others are left out:
    they are named in a warning, or in the GraftError that is raised if `prompts` end too early.
    """
    taken: EncodedPrompts = {}
    dropped: EncodedPrompts = {}
    left = most or math.inf
    while left > 0 and len(taken) < count and (prompt := next(prompts, None)) is not None:
        token_ids = tuple(client.encode(prompt))
        if len(token_ids) > max_tokens:
            dropped[prompt.id] = token_ids
        else:
            taken[prompt.id] = token_ids
            left -= len(token_ids) + new_tokens
    names = ", ".join(f"{name} ({len(token_ids)})" for name, token_ids in dropped.items())
    too_long = f"with more than {max_tokens} tokens, left out: {names or 'none'}"
    if len(taken) < count and left > 0:
        found = f"{len(taken)} prompts for {what_for}, expected {count}; {too_long}"
        raise GraftError(f"{found}; allow longer prompts, or ask for fewer")
    if dropped:
        logging.getLogger(__name__).warning("prompts for %s %s", what_for, too_long)
    return taken, dropped


def load_calibration(source: str, count: int | None = None) -> list[Prompt]:
    """Return the first `count` prompts, or all; GraftError as `iterate_prompts`, or for too few."""
    prompts = list(islice(iterate_prompts(source), count))
    if len(prompts) < (count or 0):
        raise GraftError(f"{source}: {len(prompts)} prompts, expected {count}; ask for fewer")
    return prompts


def iterate_prompts(source: str) -> Iterator[Prompt]:
    """Yield the prompts of `source` in order, reading no more of it than is asked for.

    `source` is a JSON Lines or Parquet file, or `hub:owner/dataset[:split]`. Of a conversation,
    everything up to its last user turn is the prompt; one that was there before is left out. Raises
    GraftError for a source that cannot be read, a row that is no prompt and an id that comes twice.
    """
    read = _parquet_rows if source.endswith(".parquet") else _json_rows
    rows = _hub_rows(source) if source.startswith(HUB) else read(Path(source))
    seen: set[str] = set()
    asked: set[int] = set()  # hashes
    for number, row in rows:
        prompt = _parse(row, f"{source}:{number}")
        if prompt.id in seen:
            raise GraftError(f"{source}:{number}: id {prompt.id!r} comes twice")
        seen.add(prompt.id)
        if (content := hash(str(prompt.content))) not in asked:
            asked.add(content)
            yield prompt
    if not seen:
        raise GraftError(f"{source}: no prompts; {_EXPECTED}")


Rows = Iterator[tuple[int, Any]]  # numbered from 1


def _json_rows(path: Path) -> Rows:
    if path.exists() and not path.is_file():  # a device or a pipe may never end
        raise GraftError(f"{path}: not a file; expected prompts")
    with translated(f"{path}: not readable", OSError, ValueError, then="; expected prompts"):
        lines = fetched(path.read_bytes()).decode().split("\n")
    for number, line in enumerate(lines, start=1):
        with translated(f"{path}:{number}: not JSON", ValueError):
            if line.strip():
                yield number, from_json(line)


def _parquet_rows(path: Path) -> Rows:
    missing = f"{path}: pyarrow is not installed; pip install pyarrow, or name a JSON Lines file"
    with translated(missing, ImportError):
        arrow, parquet = map(import_module, ("pyarrow", "pyarrow.parquet"))
    with translated(f"{path}: not a readable Parquet file", arrow.ArrowException, OSError):
        batches = parquet.ParquetFile(path).iter_batches(batch_size=256)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def _hub_rows(source: str) -> Rows:
    """Yield the rows of a split's files, `data/SPLIT-NNNNN-...`, fetched when it is reached."""
    from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download

    from mtp_graft.stages.fetch import hub_errors

    repo, _, split = source.removeprefix(HUB).partition(":")
    split = split or "train_sft"  # ultrachat_200k's, for supervised fine-tuning
    with hub_errors(source, "a JSON Lines file"):
        commit = Path(snapshot_download(repo, repo_type="dataset", allow_patterns="README.md")).name
        at: Any = {"repo_type": "dataset", "revision": commit}
        listed = sorted(file.path for file in get_cached_repo_tree(repo, **at))
        parquet = {f: Path(f).name for f in listed if f.endswith(".parquet")}
        chosen = [file for file, name in parquet.items() if name.startswith(f"{split}-")]
        if not chosen:
            found = sorted({name.partition("-")[0] for name in parquet.values()})
            raise GraftError(f"{source}: no Parquet files of split {split!r}, found {found}")
        for file in chosen:
            yield from _parquet_rows(Path(hf_hub_download(repo, file, **at)))


def _parse(row: Any, where: str) -> Prompt:
    with translated(f"{where}: not a prompt", ValidationError, then=f"; {_EXPECTED}"):
        found = _Row.model_validate(row)
    turns = [turn.model_dump() for turn in found.messages or ()]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not (turns or found.text):
        raise GraftError(f"{where}: prompt {found.id!r} asks nothing; {_EXPECTED}")
    return Prompt(found.id, tuple(turns) or found.text or "")
