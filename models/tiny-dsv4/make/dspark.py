"""Train a small DSpark drafter for the bundled base and write it in upstream's format.

    python models/tiny-dsv4/make/dspark.py --texts CAPTURE --data DATA --out models/tiny-dsv4/dspark

CAPTURE's calibration texts are trained on, and many that the base writes first: few are soon known
by heart. Its evaluation texts are drafted greedily to judge by. The stages start as the MTP head's
layer. The loss is that of the DSpark paper (arXiv 2607.05147); targets follow from the residual,
which is computed once. The last part of the steps has weights as they will be stored.

Shapes: N tokens of all texts together, A anchors, B rows of a block, S streams, L taps, D hidden
size, V vocabulary.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import Corpus
from evaluate import autocast
from export import write_upstream
from fake_quant import head_format
from forward import batches, load_base, new_texts, states
from model import Weights, balance, compute_weights, count_load, drop, expert_load, initial_value
from torch import Tensor, nn
from torch.func import functional_call
from train import Log, gradient_function, learning_rate, make_optimizer, update

from mtp_graft.checkpoint.capture import FinishedText, read_texts
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.dspark import DSpark, block_tokens
from mtp_graft.dsv4.heal import OUTPUT, BaseOutput
from mtp_graft.dsv4.names import HEAD_PREFIX, head_from_module, head_shapes
from mtp_graft.dsv4.replay import build_dspark, model_config
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.stages.inputs import CALIBRATION, EVALUATION

TINY = Path(__file__).parent.parent
CE, TOTAL_VARIATION, CONFIDENCE = 0.1, 0.9, 1.0  # weights in the loss
DECAY = 4.0  # row i of a block counts exp(-i / DECAY)
NOISE = 4033  # <｜fim▁hole｜>, which is in no text
BALANCE = 1e-3  # of the routers' biases, at first


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, help="a capture")
    parser.add_argument("--data", type=Path, required=True, help="as train.py takes it")
    parser.add_argument("--questions", type=int, default=60_000, help="that the base answers first")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3], help="of taps")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--rank", type=int, default=32, help="of the Markov head")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--anchors", type=int, default=4096, help="a step")
    parser.add_argument("--run-length", type=int, default=32, help="of anchors in a row")
    parser.add_argument("--qat-part", type=float, default=0.3, help="share of --steps")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--look-every", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=6.0, help="hard limit; shortens training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


@dataclass(frozen=True)
class Texts:
    """Captured texts, one after the other."""

    ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    left: Tensor  # int64 [N], tokens that follow in the same text, in an answer; else 0
    anchors: Tensor  # int64, the places where that is not 0
    residual: Tensor  # [N, S, D]
    taps: Tensor  # [N, L, D]


def computed(base: Any, texts: Iterable[FinishedText], layers: list[int]) -> Texts:
    """Return texts with what the base computes on them."""
    parts: list[tuple[Tensor, ...]] = []
    for some in batches(texts):
        for text, (residual, taps, _) in zip(some, states(base, some, layers), strict=True):
            ids = torch.tensor(text.token_ids)
            at = torch.arange(len(ids))
            left = (len(ids) - 1 - at) * (at >= len(text.prompt))
            streams = residual.unflatten(1, (base.config.hc_mult, -1))
            own = ids, at, left, left, streams, taps.unflatten(1, (len(layers), -1))
            parts.append(tuple(tensor.to(base.device) for tensor in own))
    joined = [torch.cat(part) for part in zip(*parts, strict=True)]
    joined[3] = joined[3].nonzero()[:, 0]
    return Texts(*joined)


class Drafting(nn.Module):
    """The drafter on captured texts, in one call, which is what functional_call substitutes in."""

    def __init__(self, drafter: DSpark, base: BaseOutput, embed: Tensor, block: int) -> None:
        super().__init__()
        self.drafter, self.base, self.embed, self.block = drafter, base, embed, block

    def forward(
        self, texts: Texts, first: Tensor, length: int = 1, drafts: int | None = None
    ) -> Any:
        """Return the loss's parts at runs of `length` anchors, A in all, or int64 [A, drafts].

        A run begins at each of the places `first`; its anchors share their context.
        """
        rows = self.block if drafts is None else drafts
        count = self.drafter.window + length
        at = torch.arange(count, device=first.device) - self.drafter.window
        places = (first[:, None] + at).clamp(0, len(texts.ids) - 1)  # [runs, W + length]
        seen = places.flatten()
        context = self.drafter.context(texts.taps[seen].to(self.embed.dtype), texts.positions[seen])
        anchors = places[:, -length:].flatten()
        within = torch.arange(len(seen), device=first.device).view_as(places)[:, -length:].flatten()
        embeds = self.embed[block_tokens(texts.ids[anchors], NOISE, rows)]
        hidden = self.drafter(embeds, context, within, texts.positions[anchors])  # [A, B, D]
        if drafts is None:
            return self.loss(texts, anchors, hidden)
        return self.drafter.draft(hidden, texts.ids[anchors], self.base.lm_head.to(self.embed))

    def loss(self, texts: Texts, anchors: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return the loss and its parts, of the rows whose token the text has."""
        row = torch.arange(self.block, device=anchors.device)
        weights = (row / -DECAY).exp() * (row < texts.left[anchors][:, None])  # [A, B]
        weights = weights / weights.sum()
        last = len(texts.ids) - 2
        known = (anchors[:, None] + row).clamp(max=last)  # what the row's draft follows
        lm_head = self.base.lm_head.to(self.embed)
        logits = self.drafter.logits(hidden, texts.ids[known], lm_head)
        draft = logits.float().log_softmax(-1)  # [A, B, V]
        with torch.no_grad(), torch.autocast(draft.device.type, enabled=False):
            target = self.base(texts.residual[known.flatten()]).view_as(draft)
        distance = (draft.exp() - target.exp()).abs().sum(-1)  # [A, B]
        accepted = 1 - distance.detach() / 2
        ce = -draft.gather(-1, texts.ids[known + 1][..., None])[..., 0]
        sure = self.drafter.confidence(hidden, texts.ids[known])
        bce = F.binary_cross_entropy_with_logits(sure, accepted, reduction="none")
        parts = {"ce": ce, "distance": distance, "bce": bce}
        means = {name: (weights * part).sum() for name, part in parts.items()}
        loss = CE * means["ce"] + TOTAL_VARIATION * means["distance"] + CONFIDENCE * means["bce"]
        first = (weights[:, 0] * accepted[:, 0]).sum() / weights[:, 0].sum()
        return {"loss": loss, **means, "first": first}


def initial_tensors(settings: dict[str, Any], seed: int) -> Weights:
    """Return `mtp.*` tensors: in each stage those that the MTP head has, else noise."""
    found = decode_head(load_tensors(TINY / "upstream"))
    generator = torch.Generator().manual_seed(seed)
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
            "compress_ratios": [*self.settings["compress_ratios"][:-1], *[0] * args.stages],
            "dspark_block_size": args.block,
            "dspark_markov_rank": args.rank,
            "dspark_noise_token_id": NOISE,
            "dspark_target_layer_ids": args.layers,
            "n_mtp_layers": args.stages,
        }
        base = load_base(TINY / "base", args.device)
        texts = read_texts(args.texts)
        trained, judged = ([t for t in texts if t.split == s] for s in (CALIBRATION, EVALUATION))
        more = new_texts(base, Corpus(args.data, TINY / "base"), args.questions)
        self.texts = computed(base, chain(trained, more), args.layers)
        self.held_out = computed(base, judged, args.layers)
        self.drafting = self.build(initial_tensors(self.settings, args.seed))
        for stage in self.drafting.drafter.stages:
            for module in (stage.self_attn, stage.mlp):
                module.register_forward_hook(lambda m, _, out: drop(m, out, args.dropout))
        self.routers = [stage.mlp.gate for stage in self.drafting.drafter.stages]
        for router in self.routers:
            router.load = torch.zeros(router.num_experts, device=self.device)
            router.register_forward_hook(count_load)
        arguments = {name: str(value) for name, value in vars(args).items()}
        counts = {"tokens": len(self.texts.ids), "anchors": len(self.texts.anchors)}
        self.log.write("start", **counts, settings=arguments, torch=torch.__version__)

    def build(self, tensors: Weights) -> Drafting:
        """Return a drafter with these `mtp.*` tensors, and what it drafts with."""
        config = model_config(self.settings)
        read = load_tensors(TINY / "base", ["embed.weight", *OUTPUT])
        given = {name: tensor.to(self.device) for name, tensor in read.items()}
        embed = given["embed.weight"]  # on a GPU the streams are of its type, as in the server
        embed = embed if embed.is_cuda else embed.float()
        drafter = build_dspark(config, tensors, self.args.stages, device=str(self.device))
        return Drafting(drafter, BaseOutput(config, given), embed, self.args.block)

    def run(self, drafting: Drafting, quantize: bool, *arguments: Any) -> Any:
        """Call it in BF16 on a GPU, in float32 on a CPU, perhaps with weights as stored."""
        weights = compute_weights(drafting.drafter, head_format if quantize else None)
        named = {f"drafter.{name}": weight for name, weight in weights.items()}
        with autocast(self.device):
            return functional_call(drafting, named, arguments)

    def train(self) -> None:
        """Train to the last step or to the time limit."""
        args, drafter = self.args, self.drafting.drafter.train()
        optimizer = make_optimizer(drafter, args.weight_decay, self.device.type == "cuda")
        generator = torch.Generator(self.device).manual_seed(args.seed)
        size, device = (args.anchors // args.run_length,), self.device
        gradients, quantize = None, False
        began = time.monotonic()
        for step in range(args.steps):
            late = (time.monotonic() - began) / (60 * args.minutes)
            if (progress := max(step / args.steps, late)) >= 1:
                break
            count = len(self.texts.anchors)
            chosen = torch.randint(count, size, generator=generator, device=device)
            first = self.texts.anchors[chosen]
            if gradients is None or quantize != (progress >= 1 - args.qat_part):
                quantize = progress >= 1 - args.qat_part
                gradients = None  # frees the first graph's memory before the second is captured
                gradients = self.gradients(quantize, first)
            metrics = gradients(first)
            update(optimizer, learning_rate(args.lr, progress, warmup=0.04))
            if step % 50 == 0:
                self.log.train(step, metrics, quantized=quantize, load=expert_load(self.routers))
            balance(self.routers, BALANCE * (1 - progress))
            if (step + 1) % args.look_every == 0:
                self.look("held_out", self.drafting, quantize, step=step + 1)

    def gradients(self, quantize: bool, example: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
        """Return what fills the gradients at runs from `first`; on a GPU a CUDA graph."""

        def loss(first: Tensor) -> dict[str, Tensor]:
            return self.run(self.drafting, quantize, self.texts, first, self.args.run_length)

        return gradient_function(loss, [*self.drafting.drafter.parameters()], example)

    @torch.no_grad()
    def look(self, event: str, drafting: Drafting, quantize: bool, **values: int) -> None:
        """Log the accepted length, the base's own token included, of k = 1, 2, ... drafts."""
        drafting.eval()
        lengths = {}
        for k in range(1, self.args.block + 1):
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
        stages, out = self.args.stages, self.args.out
        shards = [f"model-{n + 2:05}-of-{stages + 1:05}.safetensors" for n in range(stages)]
        write_upstream(head_from_module(state, stages), self.settings, out, *shards)
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
