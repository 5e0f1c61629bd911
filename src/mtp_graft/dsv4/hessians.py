"""The Hessians of the routed experts' matrices: H = sum x x^T over the inputs x of a matrix.

w1 and w3 read the same inputs, the tokens that the router sends to their expert, and share one
Hessian. w2 reads what w1 and w3 make of them and has its own.

Shapes: N tokens of all sequences, T tokens that reach one expert, K experts a token, E experts of a
batch, D hidden size, M the experts' intermediate size, I inputs of a matrix.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Tokens in work at once; bounds memory where an expert has very many.
_TOKENS = 8192


class RoutedTokens:
    """The inputs of all routed experts; a token is stored once, however many experts it reaches."""

    def __init__(self, x: Tensor, experts: Tensor, num_experts: int) -> None:
        """Sort the tokens `x` [N, D] by the `experts` [N, K] that the router chose for them."""
        self.x = x
        by_expert = experts.flatten().long().argsort(stable=True)
        self.counts: list[int] = experts.flatten().bincount(minlength=num_experts).tolist()
        self._tokens = (by_expert // experts.shape[1]).split(self.counts)  # of each expert [T]

    def of_expert(self, expert: int) -> Iterator[Tensor]:
        """Yield the tokens [T, D] that reach an expert in their order, a few thousand at a time.

        All tokens are yielded for an expert that none reached.
        """
        chosen = self._tokens[expert].split(_TOKENS)
        yield from map(self.x.__getitem__, chosen) if self.counts[expert] else self.x.split(_TOKENS)


def expert_hessians(
    tokens: Sequence[Iterable[Tensor]], weights: Mapping[str, Tensor], limit: float
) -> dict[str, Tensor]:
    """Return the Hessian f32 [E, I, I] of each matrix's inputs, by "w1", "w2", "w3".

    `tokens` are each expert's, in parts [T, D]; `weights` are the originals w1, w3 [E, M, D] and
    w2 [E, D, M]; `limit` is the model's `swiglu_limit`.
    """
    w1, w3 = weights["w1"], weights["w3"]
    num_experts, inner, hidden = w1.shape
    h13 = torch.zeros(num_experts, hidden, hidden, device=w1.device)  # of w1 and w3, [E, D, D]
    h2 = torch.zeros(num_experts, inner, inner, device=w1.device)  # of w2, [E, M, M]
    for e, parts in enumerate(tokens):
        for part in parts:
            x = part.to(w1.device)  # [T, D]
            h13[e] += _gram(x)
            # What w2 reads [T, M], without the routing weight: the expert's own error counts.
            gate = F.silu((x.float() @ w1[e].T).clamp(max=limit))
            a = gate * (x.float() @ w3[e].T).clamp(-limit, limit)
            h2[e].addmm_(a.T, a)
    return {"w1": h13, "w2": h2, "w3": h13}


def _gram(x: Tensor) -> Tensor:
    """Return x^T x f32 [D, D] of tokens x [T, D]."""
    if x.is_cuda and x.dtype == torch.bfloat16:  # whose products are exact in float32
        return torch.mm(x.T, x, out_dtype=torch.float32)
    return x.float().T @ x.float()
