"""Record what the bundled base computes on captured texts, with transformers instead of a server.

    python models/tiny-dsv4/make/forward.py --texts CAPTURE... --out RUN/capture

It records what a capture with taps has; a million tokens take a GPU some seconds. The server
rounds activations and keys to FP8, which this does not, so numbers about a server come from a
capture of its own. `dspark.py` trains on more texts, which `new_texts` lets the base write.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from data import BOS, END_OF_THINKING, EOS, Corpus, repetition
from model import positions_of
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
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

States = dict[str, Tensor]
TINY = Path(__file__).parent.parent
BATCH, WRITTEN = 256, 400_000  # texts at once; tokens of prompts answered at once
SHARED_KEY = "shared_key"  # name of `shared_key_attention`
REPEATED, VERSE = 600, 256  # sentences; tokens of a piece
NEW_TOKENS, LENGTH_STEP = 128, 16  # prompts written to at once have one length: no padding
ROUND = 40_000  # questions of all lengths


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="captures")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3], help="of the taps")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def load_base(folder: Path, device: str) -> DeepseekV4ForCausalLM:
    """Return the base in float32."""
    config = model_config(json.loads((folder / "config.json").read_text()))
    with torch.device(device):
        base = DeepseekV4ForCausalLM._from_config(
            config, dtype=torch.float32, attn_implementation=SHARED_KEY
        ).eval()
    stored = load_tensors(folder)
    tables = {name: stored.pop(name) for name in list(stored) if name.endswith(".tid2eid")}
    weights = decode_head(stored) | tables
    for name, tensor in base.state_dict().items():
        for native, part in split_experts(name, tensor).items():  # parts are views
            part.copy_(weights[native])
    return base


def shared_key_attention(
    module: Any, query: Tensor, key: Tensor, _: Tensor, mask: Tensor, scaling: float, **__: Any
) -> tuple[Tensor, None]:
    """Return what transformers' eager attention does, without a copy of the key for each head."""
    scores = (query.flatten(1, 2) @ key[:, 0].mT * scaling).unflatten(1, query.shape[1:3]) + mask
    sinks = module.sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    shares = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]  # [B, H, T, keys]
    out = (shares.flatten(1, 2) @ key[:, 0]).view(query.shape)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(SHARED_KEY, shared_key_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(SHARED_KEY, eager_mask)


def new_texts(base: Any, corpus: Corpus, questions: int) -> Iterator[FinishedText]:
    """Yield sentences repeated, verse that the base was trained on, and answers of its own."""
    begins = corpus.encode(END_OF_THINKING)[0]
    for n, ids in enumerate(chain(_trained_on(corpus), _answers(base, corpus, questions))):
        at = ids.index(begins) + 1 if begins in ids else 1
        yield FinishedText(n, f"new-{n}", "calibration", tuple(ids[:at]), tuple(ids[at:]))


def _trained_on(corpus: Corpus) -> Iterator[list[int]]:
    rng, verse = random.Random(0), corpus.shakespeare
    for _ in range(REPEATED):
        yield corpus.encode(repetition(rng.choice(corpus.sentences), rng.randint(2, 6)))
    for at in range(0, len(verse), VERSE):
        yield [*corpus.encode(BOS), *verse[at : at + VERSE]]


def _answers(base: Any, corpus: Corpus, questions: int) -> Iterator[list[int]]:
    """Yield mixed questions, each with the base's greedy answer."""
    drawn = corpus.mixed_questions(random.Random(0))
    even = (prompt for prompt in drawn if len(prompt) % LENGTH_STEP == 0)
    end = corpus.encode(EOS)[0]
    how = {"max_new_tokens": NEW_TOKENS, "eos_token_id": end, "pad_token_id": end}
    while some := list(islice(even, min(ROUND, questions))):
        questions -= len(some)
        by_length = defaultdict[int, list[list[int]]](list)
        for prompt in some:
            by_length[len(prompt)].append(prompt)
        for length, prompts in by_length.items():
            for given in torch.tensor(prompts, device=base.device).split(WRITTEN // length):
                kept = torch.ones_like(given)
                written = base.generate(given, attention_mask=kept, do_sample=False, **how)
                for ids in written.tolist():
                    yield ids[: ids.index(end, length) + 1] if end in ids[length:] else ids


def batches(texts: Iterable[FinishedText]) -> Iterator[list[FinishedText]]:
    """Yield up to BATCH texts at a time."""
    remaining = iter(texts)
    return iter(lambda: list(islice(remaining, BATCH)), [])


@torch.no_grad()
def states(base: Any, texts: Sequence[FinishedText], layers: Sequence[int]) -> list[States]:
    """Return each text's residual [T, S * D], taps [T, L * D], best tokens [T], LM head's input."""
    seen: dict[int, Tensor] = {}
    hooks = [
        base.model.layers[n].register_forward_hook(lambda _, __, x, n=n: seen.update({n: x}))
        for n in {*layers, -1}
    ]
    ids = [torch.tensor(text.token_ids, device=base.device) for text in texts]
    padded = pad_sequence(ids, batch_first=True, padding_value=2)
    positions = positions_of(padded)
    hidden = base.model(padded, position_ids=positions, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    taps = torch.stack([seen[n].mean(dim=2) for n in layers], dim=2).flatten(2)  # [B, T, L * D]
    rows = {"residual": seen[-1].flatten(2).bfloat16(), "taps": taps.bfloat16()}
    rows |= {"targets": base.lm_head(hidden).argmax(-1).int(), "hidden": hidden.bfloat16()}
    return [
        {name: of_all[n, : len(own)].clone() for name, of_all in rows.items()}
        for n, own in enumerate(ids)
    ]


def record(base: Any, texts: list[FinishedText], layers: list[int], out: Path, name: str) -> None:
    """Write one recording of some texts, and their lines."""
    found = states(base, texts, layers)
    names = ("residual", "taps", "targets")
    tensors = {key: torch.cat([each[key] for each in found]).cpu() for key in names}
    ids = [torch.tensor(text.token_ids) for text in texts]
    starts = torch.tensor([0, *map(len, ids)]).cumsum(0)[:-1]
    tensors |= {"token_ids": torch.cat(ids).int(), "starts": starts.int()}
    save_shard(tensors, out / RECORDINGS / name)
    for text, start in zip(texts, starts.tolist(), strict=True):
        append_row(out, text)
        size = len(text.prompt), len(text.token_ids)
        append_row(out, CapturedSequence(text.number, text.id, text.split, *size, name, start))


def main() -> None:
    args = parse_arguments()
    texts = [text for folder in args.texts for text in read_texts(folder)]
    texts = [replace(text, number=n) for n, text in enumerate(texts)]
    base = load_base(TINY / "base", args.device)
    (args.out / RECORDINGS).mkdir(parents=True)
    for n, some in enumerate(batches(texts), start=1):
        record(base, some, args.layers, args.out, f"{n:06d}.safetensors")


if __name__ == "__main__":
    main()
