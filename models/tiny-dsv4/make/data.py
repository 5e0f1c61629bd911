"""Training and held-out text of the tiny model, and how it is packed into rows.

Trained on: GSM8K's train split, the first 90 % of tinyshakespeare, and synthetic documents that
repeat a training sentence (they teach copying, which real checkpoints can do).
Held out, never trained on: `gsm8k-test` (GSM8K's test split) and `shakespeare-tail` (the rest).
"""

import json
import random
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, END_OF_THINKING = "<｜User｜>", "<｜Assistant｜>", "</think>"
TRAINED_PART = 0.9  # of tinyshakespeare
REPEAT_PART = 0.04  # of the training rows' tokens


def chat_prompt(question: str) -> str:
    """Return the DeepSeek-V4 encoding of one user turn, thinking off, ready for the answer."""
    return f"{BOS}{USER}{question}{ASSISTANT}{END_OF_THINKING}"


def chat(question: str, answer: str) -> str:
    """Return one finished turn."""
    return f"{chat_prompt(question)}{answer}{EOS}"


def read_gsm8k(data: Path, split: str) -> list[dict[str, str]]:
    """Return GSM8K's rows (`question`, `answer`) of `split`, 'train' or 'test'."""
    lines = (data / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_shakespeare(data: Path) -> tuple[str, str]:
    """Return tinyshakespeare's trained and held-out part."""
    text = (data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = int(TRAINED_PART * len(text))
    return text[:cut], text[cut:]


def training_texts(data: Path) -> list[str]:
    """Return the raw training text, for choosing the tokenizer's merges."""
    texts = [row[field] for row in read_gsm8k(data, "train") for field in ("question", "answer")]
    return [*texts, read_shakespeare(data)[0]]


def repetition(sentence: str, count: int) -> str:
    """Return the document that asks for `sentence` `count` times and gets it."""
    question = f"Repeat this sentence {count} times: {sentence}"
    return chat(question, "\n".join([sentence] * count))


class Corpus:
    """The tokenized text, and an endless shuffled stream of training rows."""

    def __init__(self, data: Path, tokenizer_dir: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
        train = read_gsm8k(data, "train")
        self.questions = [row["question"] for row in train]
        self.chats = self._encode_all([chat(row["question"], row["answer"]) for row in train])
        trained, tail = read_shakespeare(data)
        self.shakespeare = self.encode(trained)
        lines = [line for line in trained.splitlines() if 20 < len(line) < 80]
        ends = [question.split(". ")[0] + "." for question in self.questions]
        self.sentences = lines + [end for end in ends if 20 < len(end) < 80]
        test = read_gsm8k(data, "test")
        self.test_questions = [row["question"] for row in test]
        self.test_chats = self._encode_all([chat(row["question"], row["answer"]) for row in test])
        self.shakespeare_tail = self.encode(tail)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; special tokens in it become single ids."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        return [item.ids for item in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    @property
    def num_tokens(self) -> int:
        """Tokens of real training text, the synthetic documents not counted."""
        return len(self.shakespeare) + sum(map(len, self.chats))

    def epoch(
        self, rng: random.Random, length: int, extra: list[list[int]] | None = None
    ) -> list[list[int]]:
        """Return one shuffled pass over the training text (and `extra`) as rows of `length` ids.

        A row starts with a document's first token; what does not fit into it is dropped.
        """
        documents = [*self.chats, *self._shakespeare_chunks(rng, length), *(extra or [])]
        budget = REPEAT_PART * self.num_tokens
        while budget > 0:
            text = repetition(rng.choice(self.sentences), rng.randint(2, 30))
            documents.append(self.encode(text))
            budget -= len(documents[-1])
        rng.shuffle(documents)
        return list(pack(documents, length))

    def _shakespeare_chunks(self, rng: random.Random, length: int) -> Iterator[list[int]]:
        """Cut the text at another offset every time; every other chunk starts with bos."""
        bos = self.encode(BOS)
        for start in range(rng.randrange(length), len(self.shakespeare), length):
            yield (bos if rng.random() < 0.5 else []) + self.shakespeare[start : start + length]

    def batches(
        self, seed: int, batch: int, length: int, extra: list[list[int]] | None = None
    ) -> Iterator[Tensor]:
        """Yield training batches [batch, length] int64 without end, epoch after epoch."""
        rng = random.Random(seed)
        rows: list[list[int]] = []
        while True:
            while len(rows) < batch:
                rows.extend(self.epoch(rng, length, extra))
            yield torch.tensor(rows[:batch])
            del rows[:batch]

    def held_out(self, num_rows: int, length: int) -> dict[str, Tensor]:
        """Return rows [num_rows, length] of both held-out splits, always the same ones."""
        tail = [
            self.shakespeare_tail[start : start + length]
            for start in range(0, len(self.shakespeare_tail) - length, length)
        ]
        splits = {"gsm8k-test": list(pack(self.test_chats, length)), "shakespeare-tail": tail}
        return {name: torch.tensor(rows[:num_rows]) for name, rows in splits.items()}

    def held_out_prompts(self, count: int) -> dict[str, list[list[int]]]:
        """Return `count` prompts of either held-out split."""
        chats = [self.encode(chat_prompt(question)) for question in self.test_questions[:count]]
        stride = len(self.shakespeare_tail) // count
        bos = self.encode(BOS)
        tails = [bos + self.shakespeare_tail[i * stride :][:48] for i in range(count)]
        return {"gsm8k-test": chats, "shakespeare-tail": tails}

    def mixed_questions(self, rng: random.Random) -> Iterator[list[int]]:
        """Yield prompts without end: a question's first sentence, up to three of others, a last.

        The base knows GSM8K's questions by heart, so its answers to them are easy to draft.
        """
        questions = [re.split(r"(?<=[.!?])\s+", text.strip()) for text in self.questions]
        questions = [sentences for sentences in questions if len(sentences) > 1]
        first = self._encode_all([sentences[0] for sentences in questions])
        others = self._encode_all([f" {s}" for sentences in questions for s in sentences[1:-1]])
        last = self._encode_all([f" {sentences[-1]}" for sentences in questions])
        begin, end = map(self.encode, chat_prompt("\0").split("\0"))
        while True:
            middle = rng.choices(others, k=rng.randint(0, 3))
            yield [*begin, *chain(rng.choice(first), *middle, rng.choice(last)), *end]

    def training_prompts(self, rng: random.Random, count: int) -> list[list[int]]:
        """Return prompts of training text with other numbers: the base knows its answers."""
        prompts = []
        for _ in range(count):
            if rng.random() < 0.3:
                start = rng.randrange(len(self.shakespeare) - 64)
                prompts.append(self.encode(BOS) + self.shakespeare[start:][: rng.randint(8, 64)])
            else:
                question = change_numbers(rng.choice(self.questions), rng)
                prompts.append(self.encode(chat_prompt(question)))
        return prompts


def change_numbers(text: str, rng: random.Random) -> str:
    """Replace every digit by a random one; a leading digit never becomes 0."""
    digit = re.compile(r"(?<![0-9])([0-9])|[0-9]")  # the group: a leading one
    return digit.sub(lambda found: str(rng.randint(int(found[1] is not None), 9)), text)


def pack(documents: list[list[int]], length: int) -> Iterator[list[int]]:
    """Yield rows of `length` ids, filled with whole documents and the start of a last one."""
    row: list[int] = []
    for document in documents:
        row = row + document
        if len(row) >= length:
            yield row[:length]
            row = []
