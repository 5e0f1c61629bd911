"""Train a small DSpark drafter for the bundled base and write it in upstream's format.

    python models/tiny-dsv4/make/dspark.py --texts CAPTURE --data DATA --out models/tiny-dsv4/dspark

CAPTURE's calibration texts are trained on, and many that the base writes first: few are soon known
by heart. Its evaluation texts are drafted greedily to judge by. The stages start as the MTP head's
layer. The loss is that of the DSpark paper (arXiv 2607.05147). What the base computes on the texts
is computed once. The last part of the steps has weights as they will be stored.

Shapes: N tokens of all texts together, A anchors, B rows of a block, L taps, D hidden size, V
vocabulary.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import Corpus
from evaluate import autocast
from export import write_upstream
from fake_quant import head_format
from forward import batches, load_base, new_texts, states
from model import Weights, balance, compute_weights, count_load, expert_load, initial_value
from torch import Tensor, nn
from torch.func import functional_call
from train import Log, gradient_function, learning_rate, make_optimizer, update

from mtp_graft.checkpoint.capture import FinishedText, read_texts
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.dspark import DSpark, block_tokens
from mtp_graft.dsv4.names import HEAD_PREFIX, head_from_module, head_shapes
from mtp_graft.dsv4.replay import build_dspark, model_config
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.stages.inputs import CALIBRATION, EVALUATION

TINY = Path(__file__).parent.parent
CE, TOTAL_VARIATION, CONFIDENCE = 0.1, 0.9, 1.0  # weights in the loss
DECAY = 4.0  # row i of a block counts exp(-i / DECAY)
NOISE = 4033  # <｜fim▁hole｜>, which is in no text
LAYERS, STAGES, BLOCK, RANK = [1, 2, 3], 2, 5, 32  # of taps; rows; of the Markov head
LR, BALANCE, QAT_PART, RUN_LENGTH = 1e-3, 1e-3, 0.3, 32  # routers' biases; anchors in a row


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, help="a capture")
    parser.add_argument("--data", type=Path, required=True, help="as train.py takes it")
    parser.add_argument("--questions", type=int, default=100_000, help="the base answers first")
    parser.add_argument("--writing-minutes", type=float, default=6.0, help="hard limit of that")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--anchors", type=int, default=4096, help="a step")
    parser.add_argument("--look-every", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=10.0, help="hard limit; shortens training")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


@dataclass(frozen=True)
class Texts:
    """Captured texts, one after the other."""

    ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    left: Tensor  # int64 [N], tokens that follow in the same text, in an answer; else 0
    anchors: Tensor  # int64, the places where that is not 0
    hidden: Tensor  # [N, D], what the base's LM head reads
    taps: Tensor  # [N, L, D]


def computed(base: Any, texts: Iterable[FinishedText]) -> Texts:
    """Return texts with what the base computes on them."""
    parts: list[list[Tensor]] = [[] for _ in range(5)]
    for some in batches(texts):
        for text, found in zip(some, states(base, some, LAYERS), strict=True):
            ids = torch.tensor(text.token_ids)
            at = torch.arange(len(ids))
            left = (len(ids) - 1 - at) * (at >= len(text.prompt))
            taps = found["taps"].unflatten(1, (len(LAYERS), -1))
            for part, own in zip(parts, (ids, at, left, found["hidden"], taps), strict=True):
                part.append(own)
    ids, at, left, hidden, taps = (torch.cat(parts.pop(0)).to(base.device) for _ in range(5))
    return Texts(ids, at, left, left.nonzero()[:, 0], hidden, taps)


class Drafting(nn.Module):
    """The drafter on captured texts, in one call, which is what functional_call substitutes in."""

    def __init__(self, drafter: DSpark, embed: Tensor, lm_head: Tensor) -> None:
        super().__init__()
        self.drafter, self.embed, self.lm_head = drafter, embed, lm_head

    def forward(
        self, texts: Texts, first: Tensor, length: int = 1, drafts: int | None = None
    ) -> Any:
        """Return the loss's parts at runs of `length` anchors, A in all, or int64 [A, drafts].

        A run begins at each of the places `first`; its anchors share their context.
        """
        rows = BLOCK if drafts is None else drafts
        at = torch.arange(-self.drafter.window, length, device=first.device)
        places = (first[:, None] + at).clamp(0, len(texts.ids) - 1)  # [runs, W + length]
        seen = places.flatten()
        context = self.drafter.context(texts.taps[seen].to(self.embed.dtype), texts.positions[seen])
        anchors = places[:, -length:].flatten()
        within = torch.arange(len(seen), device=first.device).view_as(places)[:, -length:].flatten()
        embeds = self.embed[block_tokens(texts.ids[anchors], NOISE, rows)]
        hidden = self.drafter(embeds, context, within, texts.positions[anchors])  # [A, B, D]
        if drafts is None:
            return self.loss(texts, anchors, hidden)
        return self.drafter.draft(hidden, texts.ids[anchors], self.lm_head)

    def loss(self, texts: Texts, anchors: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return the loss and its parts, of the rows whose token the text has."""
        row = torch.arange(BLOCK, device=anchors.device)
        weights = (row / -DECAY).exp() * (row < texts.left[anchors][:, None])  # [A, B]
        weights = weights / weights.sum()
        last = len(texts.ids) - 2
        known = (anchors[:, None] + row).clamp(max=last)  # what the row's draft follows
        logits = self.drafter.logits(hidden, texts.ids[known], self.lm_head)
        draft = logits.float().log_softmax(-1)  # [A, B, V]
        target = F.linear(texts.hidden[known].to(self.lm_head), self.lm_head)
        target = target.float().log_softmax(-1)
        distance = (draft.exp() - target.exp()).abs().sum(-1)  # [A, B]
        accepted = 1 - distance.detach() / 2
        ce = -draft.gather(-1, texts.ids[known + 1][..., None])[..., 0]
        sure = self.drafter.confidence(hidden, texts.ids[known])
        bce = F.binary_cross_entropy_with_logits(sure, accepted, reduction="none")
        parts = {"ce": ce, "distance": distance, "bce": bce}
        means = {name: (weights * part).sum() for name, part in parts.items()}
        loss = CE * means["ce"] + TOTAL_VARIATION * means["distance"] + CONFIDENCE * means["bce"]
        return {"loss": loss, **means}


def initial_tensors(settings: dict[str, Any]) -> Weights:
    """Return `mtp.*` tensors: in each stage those that the MTP head has, else noise."""
    found = decode_head(load_tensors(TINY / "upstream"))
    generator = torch.Generator().manual_seed(0)
    tensors: Weights = {}
    for name, shape in head_shapes(settings).items():
        known = found.get(HEAD_PREFIX + name.split(".", 2)[2])
        noise = initial_value(name, torch.Size(shape), generator)
        tensors[name] = noise if known is None else known
    return tensors


class Trainer:
    """Trains, judges and writes; holds what they share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.log = Log(args.out / "training-log.jsonl")
        self.settings = json.loads((TINY / "base" / "config.json").read_text())
        del self.settings["quantization_config"]
        self.settings |= {
            "compress_ratios": [*self.settings["compress_ratios"][:-1], *[0] * STAGES],
            "dspark_block_size": BLOCK,
            "dspark_markov_rank": RANK,
            "dspark_noise_token_id": NOISE,
            "dspark_target_layer_ids": LAYERS,
            "n_mtp_layers": STAGES,
        }
        base = load_base(TINY / "base", args.device)
        if args.device == "cuda":  # as in the server; grouped_mm is slow otherwise
            base.bfloat16()
        texts = read_texts(args.texts)
        trained, judged = ([t for t in texts if t.split == s] for s in (CALIBRATION, EVALUATION))
        end = time.monotonic() + 60 * args.writing_minutes
        more = new_texts(base, Corpus(args.data, TINY / "base"), args.questions)
        kept = takewhile(lambda _: time.monotonic() < end, more)
        self.texts = computed(base, chain(trained, kept))
        self.held_out = computed(base, judged)
        self.drafting = self.build(initial_tensors(self.settings))
        self.routers = [stage.mlp.gate for stage in self.drafting.drafter.stages]
        for router in self.routers:
            router.load = torch.zeros(router.num_experts, device=self.device)
            router.register_forward_hook(count_load)
        counts = {"tokens": len(self.texts.ids), "anchors": len(self.texts.anchors)}
        given = {name: str(value) for name, value in vars(args).items()}
        self.log.write("start", **counts, settings=given, torch=torch.__version__)

    def build(self, tensors: Weights) -> Drafting:
        """Return a drafter with these `mtp.*` tensors, and what it drafts with."""
        # On a GPU streams and logits are of these types, as in the server.
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        read = load_tensors(TINY / "base", ["embed.weight", "head.weight"])
        given = [read[name].to(self.device, dtype) for name in ("embed.weight", "head.weight")]
        config = model_config(self.settings)
        return Drafting(build_dspark(config, tensors, STAGES).to(self.device), *given)

    def run(self, drafting: Drafting, quantize: bool, *arguments: Any) -> Any:
        """Call it in BF16 on a GPU, in float32 on a CPU, perhaps with weights as stored."""
        weights = compute_weights(drafting.drafter, head_format if quantize else None)
        named = {f"drafter.{name}": weight for name, weight in weights.items()}
        with autocast(self.device):
            return functional_call(drafting, named, arguments)

    def train(self) -> None:
        """Train to the last step or to the time limit."""
        args, drafter = self.args, self.drafting.drafter.train()
        optimizer = make_optimizer(drafter, 0.1, self.device.type == "cuda")
        generator = torch.Generator(self.device).manual_seed(0)
        size, device = (args.anchors // RUN_LENGTH,), self.device
        gradients, quantize = None, False
        began = time.monotonic()
        for step in range(args.steps):
            late = (time.monotonic() - began) / (60 * args.minutes)
            if (progress := max(step / args.steps, late)) >= 1:
                break
            count = len(self.texts.anchors)
            chosen = torch.randint(count, size, generator=generator, device=device)
            first = self.texts.anchors[chosen]
            if gradients is None or quantize != (progress >= 1 - QAT_PART):
                quantize = progress >= 1 - QAT_PART
                gradients = None  # frees the first graph's memory before the second is captured
                gradients = self.gradients(quantize, first)
            metrics = gradients(first)
            update(optimizer, learning_rate(LR, progress, warmup=0.04))
            if step % 50 == 0:
                self.log.train(step, metrics, quantized=quantize, load=expert_load(self.routers))
            balance(self.routers, BALANCE * (1 - progress))
            if (step + 1) % args.look_every == 0:
                self.look("held_out", self.drafting, quantize, step=step + 1)

    def gradients(self, quantize: bool, example: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
        """Return what fills the gradients at runs from `first`; on a GPU a CUDA graph."""

        def loss(first: Tensor) -> dict[str, Tensor]:
            return self.run(self.drafting, quantize, self.texts, first, RUN_LENGTH)

        return gradient_function(loss, [*self.drafting.drafter.parameters()], example)

    @torch.no_grad()
    def look(self, event: str, drafting: Drafting, quantize: bool, **values: int) -> None:
        """Log the accepted length, the base's own token included, of k = 1, 2, ... drafts."""
        drafting.eval()
        lengths = {}
        for k in range(1, BLOCK + 1):
            made = [
                self.run(drafting, quantize, self.held_out, anchors, 1, k)
                for anchors in self.held_out.anchors.split(1024)
            ]
            lengths[str(k)] = accepted_length(self.held_out, torch.cat(made))
        drafting.train()
        self.log.write(event, quantized=quantize, **values, length=lengths)

    def save(self) -> None:
        """Write the drafter, and judge what was written."""
        state = {name: t.detach().cpu() for name, t in self.drafting.drafter.state_dict().items()}
        out = self.args.out
        shards = [f"model-{n + 2:05}-of-{STAGES + 1:05}.safetensors" for n in range(STAGES)]
        write_upstream(head_from_module(state, STAGES), self.settings, out, *shards)
        size = sum((out / shard).stat().st_size for shard in shards)
        self.log.write("saved", mebibytes=size / 2**20)
        self.look("exported", self.build(decode_head(load_tensors(out))), quantize=False)


def accepted_length(texts: Texts, drafts: Tensor) -> float:
    """Return the tokens a step of greedy decoding, given the drafts [A, k] after every anchor."""
    ahead = torch.arange(drafts.shape[1], device=drafts.device)
    following = (texts.anchors[:, None] + 1 + ahead).clamp(max=len(texts.ids) - 1)
    right = (drafts == texts.ids[following]) & (ahead < texts.left[texts.anchors][:, None])
    counts = right.cumprod(dim=1).sum(dim=1).tolist()
    accepted = dict(zip(texts.anchors.tolist(), counts, strict=True))
    tokens = steps = 0
    for first in accepted:
        if first - 1 not in accepted:  # an answer's first token
            place = first
            while (number := accepted.get(place)) is not None:
                tokens, steps, place = tokens + number + 1, steps + 1, place + number + 1
    return tokens / steps


def main() -> None:
    trainer = Trainer(parse_arguments())
    trainer.train()
    trainer.save()


if __name__ == "__main__":
    main()
