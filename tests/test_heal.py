"""Healing: what it is trained towards, that it learns, resumes, and what comes out.

The texts are cycles of tokens: the base's residual is the LM head's row of the next one.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtp_graft.checkpoint.capture import CapturedSequence
from mtp_graft.checkpoint.quant_manifest import hashes
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.heal import OUTPUT, BaseOutput, Batch, distance
from mtp_graft.dsv4.replay import build_head, model_config, unroll
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.errors import GraftError
from mtp_graft.recipe import HealSection, Loss, QuantizeSection, ScoreSection
from mtp_graft.stages.heal import _best, _in_batches, heal
from mtp_graft.stages.inputs import HEALED, read_master
from mtp_graft.stages.score import score
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import verify
from synthetic_capture import Played, write_capture

HOW = HealSection(steps=20, look_every=10, batch_tokens=60, lr=2e-3, loss={"ce": 1.0}, device="cpu")
Heal = Callable[..., dict[str, Any]]


def cycles(lm_head: Tensor, number: int, split: str) -> list[Played]:
    """Return texts of 24 tokens, each of which is followed by the next of eight in a ring."""
    played = []
    for first in range(number):
        ids = 6 + (torch.arange(24) + first) % 8
        following = 6 + (ids - 6 + 1) % 8
        residual = 3 * lm_head[following].float()[:, None].expand(-1, 4, -1)
        played.append(Played(split, 4, ids, residual.contiguous()))
    return played


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Heal:
    lm_head = load_tensors(tiny_model / "base", ["head.weight"])["head.weight"]
    capture = tmp_path_factory.mktemp("run") / "capture"
    write_capture(capture, cycles(lm_head, 8, "calibration") + cycles(lm_head, 4, "evaluation"))
    models = tiny_model / "upstream", tiny_model / "base"

    def run_heal(out: Path, report: Any = lambda *_: None) -> dict[str, Any]:
        return heal(capture, capture, *models, out, "mxfp4", "base", 128, HOW, report)

    run_heal.capture = capture  # type: ignore[attr-defined]
    return run_heal


@pytest.fixture(scope="module")
def healed(run: Heal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("healed") / "heal"
    run(out)
    return out


def test_the_distance_is_that_of_every_draft_that_the_text_has(tiny_model: Path) -> None:
    """Two texts of different lengths together, against each draft by itself."""
    config = model_config(json.loads((tiny_model / "base" / "config.json").read_text()))
    tensors = load_tensors(tiny_model / "base", ["embed.weight", *OUTPUT])
    head = build_head(config, decode_head(load_tensors(tiny_model / "upstream")))
    base, generator = BaseOutput(config, tensors), torch.Generator().manual_seed(0)
    residual = torch.randn(2, 9, 4, 256, generator=generator)
    embeds = torch.randn(2, 9, 256, generator=generator)
    lengths, weights = [9, 6], [1.0, 0.5]
    losses: dict[Loss, float] = {"tv": 1.0, "kl": 0.1, "ce": 0.2}
    batch = Batch(residual, embeds, torch.tensor(lengths))
    found = distance(head, base, batch, losses, weights)
    expected = 0.0
    with torch.no_grad():
        for draft, weight in enumerate(weights):
            each = []
            for text, length in enumerate(lengths):
                r, e = residual[text, :length], embeds[text, :length]
                stream = list(unroll(head, r[None], e[None], 2))[draft][0]
                for i in range(length - 1 - draft):  # whose answer the base gives one token later
                    q = head.logits(stream[None, i : i + 1], base.lm_head.float()).softmax(-1)[0, 0]
                    p = base(r[i + 1 + draft][None]).exp()[0]
                    kl = (p * (p / q).log()).sum()
                    each.append((p - q).abs().sum() / 2 + 0.1 * kl - 0.2 * q[p.argmax()].log())
            expected += weight * torch.stack(each).mean()
    torch.testing.assert_close(found, expected / sum(weights), rtol=1e-3, atol=1e-3)


@given(st.lists(st.integers(5, 120), min_size=1))
def test_each_text_is_in_one_batch_of_bounded_size(lengths: list[int]) -> None:
    texts = [CapturedSequence(n, "", "", 2, tokens, "", 0) for n, tokens in enumerate(lengths)]
    batches = [*_in_batches(texts, 100)]
    assert sorted(text.number for batch in batches for text in batch) == [*range(len(texts))]
    assert all(len(b) == 1 or len(b) * max(t.tokens for t in b) <= 100 for b in batches)


def test_a_head_learns_its_base(run: Heal, healed: Path, tiny_model: Path, tmp_path: Path) -> None:
    found = json.loads((healed / "report.json").read_text())
    assert found["kept"] and found["gain"][0] > 0
    assert found["after"]["length"] > found["before"]["length"] + 1
    assert found["after"]["interval"][0] > found["before"]["interval"][1]
    assert [point["step"] for point in found["curve"]] == [0, 10, 20]
    upstream, base = healed / HEALED, tiny_model / "base"
    models = run.capture, tmp_path, upstream, base  # type: ignore[attr-defined]
    heads, how = QuantizeSection(variants=("mxfp4",)), ScoreSection(device="cpu")
    scored = score(*models, tmp_path / "score", heads, how, lambda *_: None)["acceptance"]["mxfp4"]
    assert scored["length"] == pytest.approx(found["after"]["length"], abs=0.1)
    splice(base, upstream, tmp_path / "out", "mxfp4")
    assert verify(tmp_path / "out", base, upstream, None)["ok"]
    manifest = json.loads((tmp_path / "out" / "MTP_QUANT_MANIFEST.json").read_text())
    said = manifest["provenance"]["healed"]
    assert said == said | asdict(HOW) | {"tokens": 8 * 24, "linears": "base"}
    assert said["upstream"] == hashes(read_master(tiny_model / "upstream").files.values())
    assert said["capture"] == hashes([run.capture / "index.jsonl"])  # type: ignore[attr-defined]
    assert not {"seconds", "curve"} & said.keys() and str(tmp_path) not in str(said)
    stored = load_tensors(upstream)
    original = load_tensors(tiny_model / "upstream", [*stored])
    changed = {n for n in stored if stored[n].float().ne(original[n].float()).any()}
    assert changed and not any(".ffn.experts." in n or ".gate." in n for n in changed)
    assert said["trained"].keys() == {n for n in changed if not n.endswith(".scale")}
    kinds = {str(stored[n].dtype) for n in said["trained"]}
    assert {f"torch.{kind}" for kind in said["trained"].values()} == kinds


def test_a_killed_training_goes_on_where_it_was(run: Heal, healed: Path, tmp_path: Path) -> None:
    def kill(_label: str, step: int, _steps: int) -> None:
        if step == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "heal", report=kill)
    steps: list[int] = []
    again = run(tmp_path / "heal", report=lambda _label, step, _steps: steps.append(step))
    assert steps[0] == 11, "after the last look"
    _, *whole = json.loads((healed / "report.json").read_text())["curve"]
    for found, expected in zip(again["curve"][1:], whole, strict=True):
        assert found["step"] == expected["step"]
        # Threads add in another order each time.
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.05, abs=1e-4)


@pytest.mark.parametrize(("first", "kept"), [(0.796, 3.0), (0.794, 2.7)])
def test_first_drafts_may_lose_half_a_point(first: float, kept: float) -> None:
    """Where steps begin, a better head loses more: the harder places are left to first drafts."""
    before = {"first": 0.8, "by_position": [0.8], "length": 2.7}
    assert _best([before, {"first": first, "by_position": [0.7], "length": 3.0}])["length"] == kept


def test_texts_that_are_too_short_are_no_texts(tiny_model: Path, tmp_path: Path) -> None:
    short = [Played("calibration", 4, torch.arange(7), torch.ones(7, 4, 256))]
    write_capture(tmp_path / "capture", short)
    models = tmp_path, tiny_model / "upstream", tiny_model / "base"
    more = tmp_path, "mxfp4", "base", 128, HOW, lambda *_: None
    with pytest.raises(GraftError, match="no text of split 'calibration' has more than 3 tokens"):
        heal(tmp_path / "capture", *models, *more)
