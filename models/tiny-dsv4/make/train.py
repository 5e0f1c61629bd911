"""Train the tiny DeepSeek-V4 and its MTP head, quantize both, write the two checkpoints.

Three stages, each a few minutes at most on one GPU:
  float  base and head together, in BF16 with float32 master weights;
  qat    the same with fake-quantized weights, the head on the detached base, so that the shipped
         formats lose nothing that was not trained for;
  head   the head alone, distilled on the frozen base, half of it on text the base wrote itself.

    python models/tiny-dsv4/make/train.py --data DATA --tokenizer models/tiny-dsv4/base --out OUT

The same seed and settings give the same run, apart from the order of floating-point sums on a GPU
and unless `--minutes` cuts it short.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import evaluate
import torch
import torch.nn.functional as F
from data import Corpus
from model import EMBEDDING, LM_HEAD, TinyModel, Weights, balance, expert_load, initialize
from torch import Tensor

STARTED = time.monotonic()
CONFIG = Path(__file__).parent / "config.json"
Metrics = dict[str, Tensor]
LossFunction = Callable[[Tensor], Metrics]

# Shares of --minutes by which a stage has to be over; the rest is for evaluation and writing.
MAIN_UNTIL, HEAD_UNTIL = 0.62, 0.85
LR, HEAD_LR, WEIGHT_DECAY = 1.5e-3, 1e-3, 0.1  # peaks; of the decay, not in the head stage
QAT_PART = 0.35  # of --steps
EVAL_ROWS, EVAL_PROMPTS, EVAL_TOKENS = 64, 32, 96  # of each held-out split; new tokens
SELF_PROMPTS, SELF_TOKENS = 1024, 128  # which the base continues itself; new tokens
HEAD_LOSS_WEIGHT = 0.3  # in the float stage, where it also shapes the base
ROUTER_BIAS_RATE = 1e-2  # at first, when all tokens look alike to the routers; falls to 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/ and text/")
    parser.add_argument("--tokenizer", type=Path, default=CONFIG.parents[1] / "base")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400, help="of the float and qat stages")
    parser.add_argument("--head-steps", type=int, default=500, help="of the head stage")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=6.0, help="hard limit; shortens stages")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


class Log:
    """Progress on standard output and, one JSON object a line, in OUT/log.jsonl."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")

    def write(self, event: str, **values: object) -> None:
        """Log one event with rounded numbers."""
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        line = {"event": event, "seconds": round(time.monotonic() - STARTED, 1), **rounded}
        text = json.dumps(line, ensure_ascii=False)
        print(text, file=self.file, flush=True)
        print(text, flush=True)

    def train(self, step: int, metrics: Metrics, **values: object) -> None:
        """Log a training step's metrics, or end if the loss is not finite."""
        found = {name: value.item() for name, value in metrics.items()}
        if not math.isfinite(found["loss"]):
            raise SystemExit(f"step {step}: the loss is {found['loss']}; lower the rate")
        self.write("train", step=step, **found, **values)


def joint_loss(model: TinyModel, quantize: bool, rows: Tensor) -> Metrics:
    """Return the loss of base and head on `rows` [B, T+1]; in qat the head's spares the base."""
    base, head = model.base_weights(quantize), model.head_weights(quantize)
    with evaluate.autocast(rows.device):
        logits, residual = model.run_base(base, rows[:, :-1])
        embedding, lm_head = base[EMBEDDING], base[LM_HEAD]
        if quantize:
            residual, embedding, lm_head = (
                tensor.detach() for tensor in (residual, embedding, lm_head)
            )
        drafts = model.run_head(head, residual, rows[:, 1:], embedding, lm_head)[:, :-1]
    base_ce = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
    head_ce = F.cross_entropy(drafts.float().flatten(0, 1), rows[:, 2:].flatten())
    kl, agreement = distillation(drafts, logits[:, 1:])
    weight = 1.0 if quantize else HEAD_LOSS_WEIGHT
    loss = base_ce + weight * 0.5 * (head_ce + kl)
    return {"loss": loss, "base_ce": base_ce, "head_ce": head_ce, "agreement": agreement}


def head_loss(model: TinyModel, base: Weights, rows: Tensor) -> Metrics:
    """Return the head's divergence from the frozen base on `rows` [B, T+1]."""
    with evaluate.autocast(rows.device):
        with torch.no_grad():
            logits, residual = model.run_base(base, rows[:, :-1])
        head = model.head_weights(quantize=True)
        drafts = model.run_head(head, residual, rows[:, 1:], base[EMBEDDING], base[LM_HEAD])
    kl, agreement = distillation(drafts[:, :-1], logits[:, 1:])
    return {"loss": kl, "agreement": agreement}


def distillation(drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(base || head) per token and the share of equal argmaxes; both [B, T, V]."""
    target = F.log_softmax(logits.detach().float(), dim=-1).flatten(0, 1)
    drafted = F.log_softmax(drafts.float(), dim=-1).flatten(0, 1)
    kl = F.kl_div(drafted, target, reduction="batchmean", log_target=True)
    return kl, (drafted.argmax(-1) == target.argmax(-1)).float().mean()


def gradient_function(
    loss: LossFunction, parameters: list[Tensor], example: Tensor
) -> LossFunction:
    """Return a function that fills the gradients of `parameters` for a batch and gives the metrics.

    On a GPU its thousands of small kernels are captured in a CUDA graph once and replayed.
    """

    def eager(rows: Tensor) -> Metrics:
        for parameter in parameters:
            parameter.grad = None
        metrics = loss(rows)
        metrics["loss"].backward()
        return {name: value.detach() for name, value in metrics.items()}

    if not example.is_cuda:
        return eager
    static_rows = example.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager(static_rows)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static_metrics = eager(static_rows)

    def replay(rows: Tensor) -> Metrics:
        static_rows.copy_(rows)
        graph.replay()
        return static_metrics

    return replay


def make_optimizer(module: torch.nn.Module, weight_decay: float, cuda: bool) -> torch.optim.AdamW:
    """Return AdamW that decays the matrices; not the mixing, norms, sinks or position biases."""
    decayed, free = [], []
    for name, parameter in module.named_parameters():
        exempt = parameter.dim() < 2 or "_hc" in name or "hc_" in name or "position_bias" in name
        (free if exempt else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=cuda)


def learning_rate(peak: float, progress: float, warmup: float) -> float:
    """Return the rate at `progress` 0..1: linear warmup, then a cosine to 2 % of the peak."""
    if progress < warmup:
        return peak * (progress + 1e-3) / (warmup + 1e-3)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (0.02 + 0.98 * cosine)


def update(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Clip the gradients and take one step."""
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


class Trainer:
    """Runs the stages; holds what they share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.log = Log(args.out / "log.jsonl")
        torch.manual_seed(args.seed)
        self.corpus = Corpus(args.data, args.tokenizer)
        self.model = TinyModel(CONFIG, "grouped_mm", args.dropout)
        initialize(self.model, self._token_counts(), args.seed)
        self.model.to(self.device)
        for router in self.model.routers:
            router.load = router.load.to(self.device)
        self.splits = {
            name: rows.to(self.device)
            for name, rows in self.corpus.held_out(EVAL_ROWS, args.seq_len + 1).items()
        }
        settings = {name: str(value) for name, value in vars(args).items()}
        sizes = {
            "base_parameters": sum(p.numel() for p in self.model.base.parameters()),
            "head_parameters": sum(p.numel() for p in self.model.head.parameters()),
            "training_tokens": self.corpus.num_tokens,
        }
        self.log.write("start", **sizes, settings=settings, torch=torch.__version__)

    def _token_counts(self) -> Tensor:
        vocab_size = self.corpus.tokenizer.get_vocab_size()
        ids = chain(self.corpus.shakespeare, *self.corpus.chats)
        return torch.bincount(torch.tensor(list(ids)), minlength=vocab_size)

    def used_time(self) -> float:
        """Return the used share of the time limit."""
        return (time.monotonic() - STARTED) / (60 * self.args.minutes)

    def steps(
        self, count: int, until: float, seed: int, extra: list[list[int]] | None = None
    ) -> Iterator[tuple[int, float, Tensor]]:
        """Yield step, progress 0..1 and rows, to the last step or the share of the time limit."""
        args, began = self.args, self.used_time()
        batches = self.corpus.batches(seed, args.batch, args.seq_len + 1, extra)
        for step in range(count):
            late = (self.used_time() - began) / max(until - began, 1e-6)
            if (progress := max(step / count, late)) >= 1:
                break
            yield step, progress, next(batches).to(self.device)

    def main_stages(self) -> None:
        """Train base and head together, first in full precision, then as they will be shipped."""
        args, model = self.args, self.model
        optimizer = make_optimizer(model, WEIGHT_DECAY, self.device.type == "cuda")
        model.train()
        gradients, quantize = None, False
        for step, progress, rows in self.steps(args.steps, MAIN_UNTIL, args.seed):
            if gradients is None or (not quantize and progress >= 1 - QAT_PART):
                quantize = progress >= 1 - QAT_PART
                gradients = None  # frees the first graph's memory before the second is captured
                loss = partial(joint_loss, model, quantize)
                gradients = gradient_function(loss, [*model.parameters()], rows)
                self.log.write("stage", name="qat" if quantize else "float", step=step)
            metrics = gradients(rows)
            update(optimizer, learning_rate(LR, progress, warmup=0.03))
            self.report(step, args.steps, metrics, quantize)
            balance(model.routers, ROUTER_BIAS_RATE * (1 - progress))

    def head_stage(self) -> None:
        """Distil the head on the frozen base, on training text and on the base's own text."""
        args, model = self.args, self.model
        base = {name: w.detach() for name, w in model.base_weights(quantize=True).items()}
        written = self.self_generated(base)
        optimizer = make_optimizer(model.head, 0.0, self.device.type == "cuda")
        model.dropout = 0.0
        model.base.eval()
        model.head.train()
        gradients, steps = None, args.head_steps
        for step, progress, rows in self.steps(steps, HEAD_UNTIL, args.seed + 1, written):
            if gradients is None:
                loss = partial(head_loss, model, base)
                gradients = gradient_function(loss, [*model.parameters()], rows)
                self.log.write("stage", name="head", step=step)
            metrics = gradients(rows)
            update(optimizer, learning_rate(HEAD_LR, progress, warmup=0.1))
            self.report(step, steps, metrics, quantize=True)
            balance(model.routers, 0.1 * ROUTER_BIAS_RATE * (1 - progress))

    def self_generated(self, base: Weights) -> list[list[int]]:
        """Return what the base writes after training prompts, prompts included."""
        args = self.args
        prompts = self.corpus.training_prompts(random.Random(args.seed), SELF_PROMPTS)
        prompts = sorted((p for p in prompts if len(p) <= args.seq_len), key=len)
        documents: list[list[int]] = []
        for start in range(0, len(prompts), 256):
            if self.used_time() > (MAIN_UNTIL + HEAD_UNTIL) / 2:
                break
            part = prompts[start : start + 256]
            text = evaluate.generate(self.model, base, part, SELF_TOKENS)
            documents.extend(text.documents())
        num_tokens = sum(map(len, documents))
        self.log.write("self_generated", documents=len(documents), tokens=num_tokens)
        # As much of it as of the real text.
        return documents * max(1, round(self.corpus.num_tokens / max(num_tokens, 1)))

    def report(self, step: int, steps: int, metrics: Metrics, quantize: bool) -> None:
        """Log the training metrics every 20 steps and the held-out ones every `eval_every`."""
        if step % 20 == 0 or step == steps - 1:
            self.log.train(step, metrics, load=expert_load(self.model.routers))
        if (step + 1) % self.args.eval_every == 0:
            modes = [(module, module.training) for module in self.model.modules()]
            self.evaluate_held_out(step, quantize)
            for module, training in modes:
                module.training = training

    def evaluate_held_out(self, step: int, quantize: bool) -> None:
        """Log the losses and the agreement on the held-out rows."""
        with torch.no_grad():
            base, head = self.model.base_weights(quantize), self.model.head_weights(quantize)
        batch = self.args.batch
        metrics = evaluate.held_out_metrics(self.model, base, head, self.splits, batch)
        self.log.write("held_out", step=step, quantized=quantize, **metrics)

    def final_evaluation(self) -> None:
        """Log losses, acceptance and repetitiveness of the shipped weights; print samples."""
        args = self.args
        self.evaluate_held_out(args.steps, quantize=True)
        with torch.no_grad():
            base, head = self.model.base_weights(True), self.model.head_weights(True)
        prompts = self.corpus.held_out_prompts(EVAL_PROMPTS)
        for split, ids in prompts.items():
            text = evaluate.generate(self.model, base, ids, EVAL_TOKENS)
            new = text.continuations()
            self.log.write(
                "greedy",
                split=split,
                acceptance=evaluate.acceptance(self.model, base, head, text),
                distinct_4grams=evaluate.distinct_ngrams(new),
                tokens=sum(map(len, new)),
                finished=sum(ids[-1] == evaluate.EOS for ids in new),
            )
            for document in text.documents()[:3]:
                sample = self.corpus.tokenizer.decode(document, skip_special_tokens=False)
                self.log.write("sample", split=split, text=sample)

    def save(self) -> None:
        """Quantize for real and write both checkpoints."""
        from export import export

        base, head = (
            {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
            for module in (self.model.base, self.model.head)
        )
        export(base, head, CONFIG, self.args.out)
        self.log.write("saved")


def main() -> None:
    args = parse_arguments()
    torch.backends.cuda.matmul.allow_tf32 = True
    trainer = Trainer(args)
    trainer.main_stages()
    trainer.head_stage()
    # Before the evaluation: what follows may be cut off, the checkpoint should not be.
    trainer.save()
    trainer.final_evaluation()


if __name__ == "__main__":
    main()
