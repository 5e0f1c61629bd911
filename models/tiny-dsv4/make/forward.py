"""Record what the bundled base computes on given texts, with transformers instead of a server.

    python models/tiny-dsv4/make/forward.py --texts CAPTURE [--data DATA] --out RUN/capture

What a capture with taps has, for the texts of other captures and what the base was trained on: a
million tokens take a GPU some seconds. The server rounds activations and keys to FP8, which this
does not, so numbers about a server come from a capture of its own.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from data import BOS, END_OF_THINKING, Corpus, repetition
from model import positions_of, skip_selection
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4ForCausalLM,
    DeepseekV4Indexer,
)

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
BATCH = 256  # texts
REPEATED, VERSE = 600, 256  # sentences; tokens of a piece


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="captures")
    parser.add_argument("--data", type=Path, help="as train.py takes it")
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
    for module in base.modules():
        if isinstance(module, DeepseekV4Indexer):
            skip_selection(module)
    return base


def training_texts(data: Path, first: int) -> Iterator[FinishedText]:
    """Yield what the base was trained on: GSM8K's chats, verse, sentences repeated."""
    corpus, rng = Corpus(data, TINY / "base"), random.Random(0)
    end, begin = (corpus.tokenizer.token_to_id(token) for token in (END_OF_THINKING, BOS))
    repeated = [
        repetition(rng.choice(corpus.sentences), rng.randint(2, 6)) for _ in range(REPEATED)
    ]
    chats = [*corpus.chats, *map(corpus.encode, repeated)]
    texts = [(ids[: (at := ids.index(end) + 1)], ids[at:]) for ids in chats]
    verse = corpus.shakespeare
    texts += [([begin], verse[at : at + VERSE]) for at in range(0, len(verse), VERSE)]
    for number, (prompt, written) in enumerate(texts):
        own = f"gold-{number}", "calibration", tuple(prompt), tuple(written)
        yield FinishedText(first + number, *own)


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


def main() -> None:
    args = parse_arguments()
    texts = [text for folder in args.texts for text in read_texts(folder)]
    texts = [FinishedText(n, t.id, t.split, t.prompt, t.continuation) for n, t in enumerate(texts)]
    texts += training_texts(args.data, len(texts)) if args.data else []
    base = load_base(TINY / "base", args.device)
    (args.out / RECORDINGS).mkdir(parents=True)
    for first in range(0, len(texts), BATCH):
        some = texts[first : first + BATCH]
        record(base, some, args.layers, args.out, f"{first // BATCH + 1:06d}.safetensors")


if __name__ == "__main__":
    main()
