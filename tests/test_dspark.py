"""The DSpark drafter against its equations, written out row by row, and its tensors' names."""

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_graft.dsv4.dspark import DSpark, block_tokens
from mtp_graft.dsv4.names import find_drafter, head_from_module, head_shapes
from mtp_graft.dsv4.replay import build_dspark, model_config
from mtp_graft.errors import GraftError

STAGES, BLOCK, WINDOW, NOISE, EPS = 3, 5, 6, 49, 1e-6
HEADS, TOP, LIMIT, SCALE = 4, 2, 0.3, 1.5
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> dict[str, Any]:
    settings = json.loads((tiny_model / "make" / "config.json").read_text())
    settings |= {"hidden_size": 32, "q_lora_rank": 16, "o_lora_rank": 8, "head_dim": 96}
    settings |= {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": TOP}
    settings |= {"sliding_window": WINDOW, "vocab_size": 50, "swiglu_limit": LIMIT}
    settings |= {"dspark_block_size": BLOCK, "dspark_noise_token_id": NOISE}
    return settings | {"dspark_markov_rank": 7, "dspark_target_layer_ids": [1, 3]}


@pytest.fixture(scope="module")
def drafter(settings: dict[str, Any]) -> DSpark:
    torch.manual_seed(0)
    drafter = DSpark(model_config(settings), STAGES).eval()
    for name, tensor in drafter.state_dict().items():
        # Nothing is left at a neutral value: norms, sinks, biases and scales all matter.
        noise = torch.randn(tensor.shape) / math.sqrt(tensor.shape[-1])
        tensor.copy_(1 + noise if "norm" in name or name.endswith("scale") else 1.5 * noise)
    return drafter


# The equations, in float64


def norm(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rope(x: Tensor, position: int) -> Tensor:
    angles = position * 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    pairs = torch.view_as_complex(x[..., -64:].unflatten(-1, (32, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones(32).double(), angles))
    return torch.cat((x[..., :-64], turned.flatten(-2)), dim=-1)


def mix(streams: Tensor, w: Weights, name: str) -> tuple[Tensor, Tensor, Tensor]:
    fn, base, scale = (w[f"hc_{name}_{part}"] for part in ("fn", "base", "scale"))
    m = fn @ norm(streams.flatten())
    pre = torch.sigmoid(m[:4] * scale[0] + base[:4]) + EPS
    post = 2 * torch.sigmoid(m[4:8] * scale[1] + base[4:8])
    c = (m[8:] * scale[2] + base[8:]).view(4, 4).softmax(-1) + EPS
    c = c / (c.sum(0) + EPS)
    for _ in range(19):
        c = c / (c.sum(1, keepdim=True) + EPS)
        c = c / (c.sum(0) + EPS)
    return sum(pre[i] * streams[i] for i in range(4)), post, c


def spread(out: Tensor, streams: Tensor, post: Tensor, c: Tensor) -> Tensor:
    rows = [post[j] * out + sum(c[i, j] * streams[i] for i in range(4)) for j in range(4)]
    return torch.stack(rows)


def attend(u: Tensor, keys: Tensor, position: int, w: Weights) -> Tensor:
    q = w["attn.wq_b.weight"] @ norm(w["attn.wq_a.weight"] @ u, w["attn.q_norm.weight"])
    heads = []
    for query, sink in zip(q.view(HEADS, -1), w["attn.attn_sink"], strict=True):
        scores = keys @ rope(norm(query), position) / math.sqrt(keys.shape[1])
        shares = scores.exp() / (scores.exp().sum() + sink.exp())
        heads.append(rope(shares @ keys, -position))
    groups = zip(torch.cat(heads).chunk(2), w["attn.wo_a.weight"].chunk(2), strict=True)
    return w["attn.wo_b.weight"] @ torch.cat([matrix @ group for group, matrix in groups])


def expert(x: Tensor, w: Weights, name: str) -> Tensor:
    gate, up = (w[f"ffn.{name}.{m}.weight"] @ x for m in ("w1", "w3"))
    return w[f"ffn.{name}.w2.weight"] @ (F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT))


def feed_forward(x: Tensor, w: Weights) -> Tensor:
    g = (w["ffn.gate.weight"] @ x).exp().log1p().sqrt()
    chosen = (g + w["ffn.gate.bias"]).argsort(descending=True)[:TOP].tolist()
    routed = sum(g[e] * expert(x, w, f"experts.{e}") for e in chosen)
    return routed / g[chosen].sum() * SCALE + expert(x, w, "shared_experts")


def block(w: Weights, taps: Tensor, embeds: Tensor) -> Tensor:
    """Return the rows [B, D] of the block after the tokens whose taps [T, L, D] are given."""
    first, streams = len(taps), [row.repeat(4, 1) for row in embeds]
    for s in range(STAGES):
        own = {n.removeprefix(f"mtp.{s}."): t for n, t in w.items() if n.startswith(f"mtp.{s}.")}

        def latent(x: Tensor, position: int, own: Weights = own) -> Tensor:
            return rope(norm(own["attn.wkv.weight"] @ x, own["attn.kv_norm.weight"]), position)

        keys = []
        for p in range(max(0, first - WINDOW), first):
            main = w["mtp.0.main_proj.weight"] @ torch.cat([*taps[p]])
            keys.append(latent(norm(main, w["mtp.0.main_norm.weight"]), p))
        mixed = [mix(x, own, "attn") for x in streams]
        inputs = [norm(a, own["attn_norm.weight"]) for a, *_ in mixed]
        keys += [latent(u, first + i) for i, u in enumerate(inputs)]
        for i, u in enumerate(inputs):
            out = attend(u, torch.stack(keys), first + i, own)
            x = spread(out, streams[i], *mixed[i][1:])
            f, *mixing = mix(x, own, "ffn")
            streams[i] = spread(feed_forward(norm(f, own["ffn_norm.weight"]), own), x, *mixing)
    fn, base, scale = (own[f"hc_head_{part}"] for part in ("fn", "base", "scale"))
    pre = [torch.sigmoid(fn @ norm(x.flatten()) * scale + base) + EPS for x in streams]
    return torch.stack([share @ x for share, x in zip(pre, streams, strict=True)])


class Case:
    """Two texts, one after the other, and anchors near their starts and far beyond a window."""

    def __init__(self, drafter: DSpark, rows: int) -> None:
        torch.manual_seed(rows)
        self.drafter, self.taps = drafter, torch.randn(9 + 21, 2, 32)
        self.embed, self.lm_head = torch.randn(2, 50, 32)
        self.at = torch.tensor([1, 5, 9, 1, 5, 7, 20, 21])
        self.anchors = self.at + torch.tensor([0, 0, 0, 9, 9, 9, 9, 9])
        self.tokens, self.previous = torch.randint(49, (8,)), torch.randint(50, (8, rows))
        self.embeds = self.embed[block_tokens(self.tokens, NOISE, rows)]

    @torch.no_grad()
    def hidden(self) -> Tensor:
        positions = torch.cat((torch.arange(9), torch.arange(21)))
        context = self.drafter.context(self.taps, positions)
        return self.drafter(self.embeds, context, self.anchors, self.at)


@pytest.mark.parametrize("rows", [BLOCK, 3])
@torch.no_grad()
def test_every_row_is_what_the_equations_say(drafter: DSpark, rows: int) -> None:
    case = Case(drafter, rows)
    w = {n: t.double() for n, t in head_from_module(drafter.state_dict(), STAGES).items()}
    hidden, previous = case.hidden(), case.previous
    logits = drafter.logits(hidden, previous, case.lm_head)
    confidence = drafter.confidence(hidden, previous)
    drafts = drafter.draft(hidden, case.tokens, case.lm_head)
    w1, w2 = (w[f"mtp.2.markov_head.markov_w{n}.weight"] for n in (1, 2))
    for a, (anchor, first) in enumerate(zip(case.anchors, case.at, strict=True)):
        taps = case.taps[anchor - first : anchor].double()
        expected = block(w, taps, case.embeds[a].double())
        close = {"rtol": 1e-3, "atol": 1e-3, "check_dtype": False}
        torch.testing.assert_close(hidden[a], expected, **close)
        prev = case.tokens[a]
        for i, h in enumerate(expected):
            unbiased = case.lm_head.double() @ norm(h, w["mtp.2.norm.weight"])
            said, known = w2 @ w1[previous[a, i]], torch.cat((h, w1[previous[a, i]]))
            torch.testing.assert_close(logits[a, i], unbiased + said, **close)
            sure = w["mtp.2.confidence_head.proj.weight"][0] @ known
            torch.testing.assert_close(confidence[a, i], sure, **close)
            prev = (unbiased + w2 @ w1[prev]).argmax()
            assert drafts[a, i] == prev


@pytest.mark.parametrize(
    ("part", "row", "is_seen"),
    [("embeds", 4, True), ("taps", 9 + 20 - WINDOW, True), ("taps", 9 + 20 - WINDOW - 1, False)],
)
def test_row_0_sees_all_and_a_window(drafter: DSpark, part: str, row: int, is_seen: bool) -> None:
    case = Case(drafter, BLOCK)
    before = case.hidden()[6, 0]
    changed = case.embeds[6] if part == "embeds" else case.taps
    changed[row] += 1
    assert torch.equal(before, case.hidden()[6, 0]) != is_seen


def test_experts_may_be_bf16_as_on_a_gpu(drafter: DSpark) -> None:
    rounded, exact = deepcopy(drafter), Case(drafter, BLOCK).hidden()
    for stage in rounded.stages:
        stage.mlp.experts.bfloat16()  # type: ignore[union-attr, operator]
    error = Case(rounded, BLOCK).hidden() - exact
    assert error.dtype == torch.float32 and 0 < error.norm() < 0.01 * exact.norm()


def test_tensors_have_upstreams_names_and_places(drafter: DSpark, settings: dict[str, Any]) -> None:
    tensors = head_from_module(drafter.state_dict(), STAGES)
    config = settings | {"n_mtp_layers": STAGES}
    assert {n: tuple(t.shape) for n, t in tensors.items()} == head_shapes(config)
    assert find_drafter(tensors, "here") == ("dspark", STAGES, sorted(tensors))
    again = build_dspark(model_config(settings), tensors, STAGES).state_dict()
    assert all(torch.equal(tensor, again[n]) for n, tensor in drafter.state_dict().items())


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["mtp.0.e_proj.weight"], ("mtp", 1)),
        (["mtp.0.main_proj.weight", "mtp.1.norm.weight"], ("dspark", 2)),
        (["mtp.0.norm.weight", "mtp.1.norm.weight"], r"blocks mtp.\{0,1\}; expected mtp.0 alone"),
        (["mtp.0.main_proj.weight", "mtp.2.norm.weight"], r"blocks mtp.\{0,2\}; expected"),
        (["mtp.1.norm.weight"], r"blocks mtp.\{1\}; expected"),
        (["layers.0.norm.weight"], "no mtp.* tensors"),
    ],
)
def test_a_drafter_is_known_by_its_tensors(names: list[str], found: Any) -> None:
    if isinstance(found, tuple):
        assert find_drafter(names, "here")[:2] == found
        return
    with pytest.raises(GraftError, match=found):
        find_drafter(names, "here")
