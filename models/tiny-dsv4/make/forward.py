"""Record what the bundled base computes on given texts, with transformers instead of a server.

    python models/tiny-dsv4/make/forward.py --texts CAPTURE [--data DATA] --out RUN/capture

What a capture with taps has, for the texts of other captures; with `--data` also for verse,
repeated sentences and what the base says to new questions, mixed from sentences of several: it
knows the answers to GSM8K's by heart, so they are easy to draft. The server rounds activations and
keys to FP8, which this does not, so numbers about a server come from a capture of its own.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from data import BOS, END_OF_THINKING, EOS, Corpus, repetition
from model import positions_of
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

from mtp_graft.checkpoint.capture import (
    RECORDINGS,
    CapturedSequence,
    FinishedText,
    append_row,
    read_texts,
)
from mtp_graft.checkpoint.shards import load_tensors, save_shard
from mtp_graft.dsv4.names import split_experts
from mtp_graft.dsv4.replay import model_config
from mtp_graft.dsv4.variants import decode_head

TINY = Path(__file__).parent.parent
BATCH = 256  # texts; eight times as many are written at once
REPEATED, VERSE = 600, 256  # sentences; tokens of a piece
NEW_TOKENS, LENGTH_STEP = 96, 8  # prompts of a batch have one length, so there is no padding


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="captures")
    parser.add_argument("--data", type=Path, help="as train.py takes it")
    parser.add_argument("--questions", type=int, default=20_000, help="new ones")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3], help="of the taps")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def load_base(folder: Path, device: str) -> DeepseekV4ForCausalLM:
    """Return the base in float32."""
    config = model_config(json.loads((folder / "config.json").read_text()))
    with torch.device(device):
        base = DeepseekV4ForCausalLM._from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    stored = load_tensors(folder)
    tables = {name: stored.pop(name) for name in list(stored) if name.endswith(".tid2eid")}
    weights = decode_head(stored) | tables
    for name, tensor in base.state_dict().items():
        for native, part in split_experts(name, tensor).items():  # parts are views
            part.copy_(weights[native])
    return base


def training_texts(corpus: Corpus) -> Iterator[list[int]]:
    """Yield sentences repeated, and verse: BOS and a piece of what the base was trained on."""
    rng, verse = random.Random(0), corpus.shakespeare
    for _ in range(REPEATED):
        yield corpus.encode(repetition(rng.choice(corpus.sentences), rng.randint(2, 6)))
    for at in range(0, len(verse), VERSE):
        yield [*corpus.encode(BOS), *verse[at : at + VERSE]]


def new_answers(base: Any, corpus: Corpus, questions: int) -> Iterator[list[int]]:
    """Yield greedy answers to mixed questions; their lengths come in an order drawn by lot."""
    rng, by_length = random.Random(0), defaultdict[int, list[list[int]]](list)
    while sum(map(len, by_length.values())) < questions:
        prompt = corpus.encode(corpus.mixed_question(rng))
        if len(prompt) % LENGTH_STEP == 0:
            by_length[len(prompt)].append(prompt)
    end = corpus.encode(EOS)[0]
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": end, "pad_token_id": end}
    for length in rng.sample(sorted(by_length), len(by_length)):
        prompts = torch.tensor(by_length[length], device=base.device)
        for some in prompts.split(8 * BATCH):
            written = base.generate(
                some, attention_mask=torch.ones_like(some), do_sample=False, **options
            )
            for ids in written.tolist():
                stop = ids.index(end, length) + 1 if end in ids[length:] else len(ids)
                yield ids[:stop]


def finished(ids: list[int], begins: int, number: int) -> FinishedText:
    """Return a text to train on whose answer begins after the token `begins`, if it is there."""
    at = ids.index(begins) + 1 if begins in ids else 1
    return FinishedText(number, f"more-{number}", "calibration", tuple(ids[:at]), tuple(ids[at:]))


@torch.no_grad()
def record(base: Any, texts: list[FinishedText], layers: list[int], out: Path, name: str) -> None:
    """Write one recording of some texts, and their lines."""
    seen: dict[int, Tensor] = {}
    hooks = [
        base.model.layers[n].register_forward_hook(lambda _, __, x, n=n: seen.update({n: x}))
        for n in layers
    ]
    hooks.append(base.model.hc_head.register_forward_pre_hook(lambda _, x: seen.update({-1: x[0]})))
    ids = [torch.tensor(text.token_ids) for text in texts]
    padded = pad_sequence(ids, batch_first=True, padding_value=2).to(base.device)
    best = base(input_ids=padded, position_ids=positions_of(padded), use_cache=False).logits.argmax(
        -1
    )
    for hook in hooks:
        hook.remove()
    taps = torch.stack([seen[n].mean(dim=2) for n in layers], dim=2).flatten(2)  # [B, T, L * D]
    rows = {"residual": seen[-1].flatten(2).bfloat16(), "taps": taps.bfloat16(), "targets": best}
    kept = {
        key: [row[: len(i)].cpu() for row, i in zip(v, ids, strict=True)] for key, v in rows.items()
    }
    starts = torch.tensor([0, *map(len, ids)]).cumsum(0)[:-1]
    tensors = {key: torch.cat(parts) for key, parts in kept.items()}
    tensors |= {"token_ids": torch.cat(ids).int(), "starts": starts.int()}
    save_shard(tensors | {"targets": tensors["targets"].int()}, out / RECORDINGS / name)
    for text, start in zip(texts, starts.tolist(), strict=True):
        append_row(out, text)
        size = len(text.prompt), len(text.token_ids)
        append_row(out, CapturedSequence(text.number, text.id, text.split, *size, name, start))


def all_texts(args: argparse.Namespace, base: Any) -> Iterator[FinishedText]:
    """Yield those of captures, then those of `--data`, numbered."""
    texts = [text for folder in args.texts for text in read_texts(folder)]
    for n, t in enumerate(texts):
        yield FinishedText(n, t.id, t.split, t.prompt, t.continuation)
    if args.data:
        corpus = Corpus(args.data, TINY / "base")
        begins = corpus.encode(END_OF_THINKING)[0]
        more = chain(training_texts(corpus), new_answers(base, corpus, args.questions))
        for n, ids in enumerate(more, start=len(texts)):
            yield finished(ids, begins, n)


def main() -> None:
    args = parse_arguments()
    base = load_base(TINY / "base", args.device)
    (args.out / RECORDINGS).mkdir(parents=True)
    texts = all_texts(args, base)
    for n in count(1):
        if not (some := list(islice(texts, BATCH))):
            break
        record(base, some, args.layers, args.out, f"{n:06d}.safetensors")


if __name__ == "__main__":
    main()
