"""What a trained pair is judged by: held-out losses, greedy text, the head's acceptance on it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from model import EMBEDDING, LM_HEAD, TinyModel, Weights
from torch import Tensor

PAD, EOS = 2, 1


@dataclass(frozen=True)
class Generated:
    """Greedy text: `ids` [B, T], valid up to `ends` [B]; `starts` [B] are the prompts' lengths."""

    ids: Tensor
    starts: Tensor
    ends: Tensor

    def documents(self) -> list[list[int]]:
        """Return prompts with continuations as lists of ids, eos included."""
        rows = zip(self.ids.tolist(), self.ends.tolist(), strict=True)
        return [row[:end] for row, end in rows]

    def continuations(self) -> list[list[int]]:
        """Return the new ids alone."""
        starts = self.starts.tolist()
        return [doc[start:] for doc, start in zip(self.documents(), starts, strict=True)]


def autocast(device: torch.device) -> torch.autocast:
    """Return BF16 autocast, on GPUs only; without the cache, which CUDA graphs cannot replay."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False
    )


@torch.no_grad()
def run_both(model: TinyModel, base: Weights, head: Weights, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return base logits [B, T, V] and head logits [B, T-1, V] for `rows` [B, T+1].

    Base position i predicts rows[:, i+1], head position i predicts rows[:, i+2].
    """
    with autocast(rows.device):
        logits, residual = model.run_base(base, rows[:, :-1])
        drafts = model.run_head(head, residual, rows[:, 1:], base[EMBEDDING], base[LM_HEAD])
    return logits.float(), drafts[:, :-1].float()


def held_out_metrics(
    model: TinyModel, base: Weights, head: Weights, splits: dict[str, Tensor], batch: int
) -> dict[str, float]:
    """Return per split the base's and the head's cross entropy and their top-1 agreement."""
    model.eval()
    metrics: dict[str, float] = {}
    for split, rows in splits.items():
        sums = torch.zeros(3, device=rows.device)
        for part in rows.split(batch):
            logits, drafts = run_both(model, base, head, part)
            base_ce = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
            head_ce = F.cross_entropy(drafts.flatten(0, 1), part[:, 2:].flatten())
            agree = (drafts.argmax(-1) == logits[:, 1:].argmax(-1)).float().mean()
            sums += torch.stack((base_ce, head_ce, agree)) * len(part)
        base_ce, head_ce, agree = (sums / len(rows)).tolist()
        metrics |= {f"{split}/base_ce": base_ce, f"{split}/head_ce": head_ce}
        metrics[f"{split}/agreement"] = agree
    return metrics


@torch.no_grad()
def generate(model: TinyModel, base: Weights, prompts: list[list[int]], num_new: int) -> Generated:
    """Continue `prompts` greedily by at most `num_new` tokens each, up to and with eos.

    There is no cache: the whole batch is run again for every token. Padding is on the right.
    """
    model.eval()
    device = base[EMBEDDING].device
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(starts.max())
    width = longest + num_new
    padded = [prompt + [PAD] * (width - len(prompt)) for prompt in prompts]
    ids = torch.tensor(padded, device=device)  # [B, width]
    ends, alive = starts.clone(), torch.ones_like(starts, dtype=torch.bool)
    for step in range(num_new):
        with autocast(device):
            logits, _ = model.run_base(base, ids[:, : longest + step])
        last = (ends - 1).view(-1, 1, 1).expand(-1, 1, logits.shape[-1])
        token = logits.gather(1, last).squeeze(1).argmax(-1)  # [B]
        column = ends.clamp(max=width - 1).unsqueeze(1)
        ids.scatter_(1, column, torch.where(alive, token, PAD).unsqueeze(1))
        ends += alive
        alive &= token != EOS
        if step % 16 == 15 and not alive.any():
            break
    return Generated(ids, starts, ends)


def acceptance(model: TinyModel, base: Weights, head: Weights, text: Generated) -> float:
    """Return the share of generated tokens, but the first, that the head would have drafted."""
    model.eval()
    _, drafts = run_both(model, base, head, text.ids)
    targets = torch.arange(2, text.ids.shape[1], device=text.ids.device)  # of drafts[:, i]: i + 2
    drafted = (targets > text.starts[:, None]) & (targets < text.ends[:, None])
    right = drafts.argmax(-1) == text.ids[:, 2:]
    return ((right & drafted).sum() / drafted.sum().clamp(min=1)).item()


def distinct_ngrams(documents: list[list[int]], n: int = 4) -> float:
    """Return distinct n-grams over all n-grams, counted per document and averaged."""
    grams = [list(zip(*(ids[i:] for i in range(n)), strict=False)) for ids in documents]
    ratios = [len(set(each)) / len(each) for each in grams if each]
    return sum(ratios) / max(len(ratios), 1)
