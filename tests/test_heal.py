"""Healing: what it is trained towards, that it learns, resumes, and what comes out.

The texts are cycles of tokens: the base's residual is the LM head's row of the next one.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import parametrize

from mtp_graft.checkpoint.capture import CapturedSequence
from mtp_graft.checkpoint.quant_manifest import MANIFEST_NAME, hashes
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.heal import OUTPUT, BaseOutput, Batch, distance, trained_parts
from mtp_graft.dsv4.replay import build_head, model_config, unroll
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.errors import GraftError
from mtp_graft.pipeline.run import run_pipeline
from mtp_graft.recipe import HealSection, Loss, load_recipe
from mtp_graft.stages.heal import _best, _in_batches, _judge, heal
from mtp_graft.stages.inputs import HEALED, Progress, read_master
from quantized import read_json
from serving.bench_server import quiet
from synthetic_capture import Played, write_capture

#: Of all runs here; `TRAINED` trains more in less time.
HOW = ("heal.steps=20", "heal.k=3", "heal.batch_tokens=60", "heal.lr=2e-3", "heal.loss={ce=1}")
HOW += ("heal.look_every=10", "heal.device=cpu", "score.device=cpu", "splice.variant=mxfp4")
HOW += ("quantize.variants=['mxfp4']", "bench.served_variants=['mxfp4']")
QUICK = ("heal.steps=10", "heal.k=1", "score.k=1")
TRAINED = (*QUICK, "splice.linear_dtype=bf16", "heal.router=true")
SPLICED = Path("splice/mxfp4/tiny-dsv4-healed")
Run = Callable[..., Path]


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
def run(repo_root: Path, tiny_model: Path, quantized: Path, tmp_path_factory: Any) -> Run:
    """Return what runs a recipe from heal to verify, once; it returns the run's folder."""
    lm_head = load_tensors(tiny_model / "base", ["head.weight"])["head.weight"]

    @cache
    def call(*overrides: str, folder: Path | None = None, report: Progress = quiet) -> Path:
        folder = folder or tmp_path_factory.mktemp("heal") / "run"
        if not folder.exists():
            texts = cycles(lm_head, 8, "calibration") + cycles(lm_head, 4, "evaluation")
            write_capture(folder / "capture", texts)
            shutil.copytree(quantized, folder / "quantize")
            for stage in ("capture", "quantize"):
                (folder / stage / "manifest.json").write_text("{}")
        recipe = load_recipe(repo_root / "recipes" / "tiny-heal.toml", [*HOW, *overrides])
        run_pipeline(recipe, folder, report, ["heal", "score", "splice", "verify"])
        return folder

    return call


def reported(folder: Path, stage: str) -> Any:
    return read_json(folder / stage / "report.json")


def changed(master: Path, original: Path) -> set[str]:
    """Return the names of the tensors whose values or scales are others now."""
    now = load_tensors(master)
    before = load_tensors(original, [*now])
    return {name for name in now if now[name].float().ne(before[name].float()).any()}


def towards(tiny_model: Path) -> tuple[MTPHead, BaseOutput, Batch]:
    """Return the tiny head, what it is trained towards, and two texts of different lengths."""
    config = model_config(json.loads((tiny_model / "base" / "config.json").read_text()))
    tensors = load_tensors(tiny_model / "base", ["embed.weight", *OUTPUT])
    head = build_head(config, decode_head(load_tensors(tiny_model / "upstream")))
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(2, 9, 4, 256, generator=generator)
    embeds = torch.randn(2, 9, 256, generator=generator)
    return head, BaseOutput(config, tensors), Batch(residual, embeds, torch.tensor([9, 6]))


def test_the_distance_is_that_of_every_draft_that_the_text_has(tiny_model: Path) -> None:
    """Two texts of different lengths together, against each draft by itself."""
    head, base, batch = towards(tiny_model)
    residual, embeds, lengths = batch.residual, batch.embeds, batch.lengths.tolist()
    weights = [1.0, 0.5]
    losses: dict[Loss, float] = {"tv": 1.0, "kl": 0.1, "ce": 0.2}
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


def test_a_head_learns_its_base(run: Run, tiny_model: Path) -> None:
    found, upstream = reported(folder := run(), "heal"), folder / "heal" / HEALED
    assert found["kept"] and found["gain"][0] > 0
    assert found["after"]["length"] > found["before"]["length"] + 1
    assert found["after"]["interval"][0] > found["before"]["interval"][1]
    assert [point["step"] for point in found["curve"]] == [0, 10, 20]
    scored = reported(folder, "score")["acceptance"]["mxfp4"]
    assert scored["length"] == pytest.approx(found["after"]["length"], abs=0.1)
    said = read_json(folder / SPLICED / MANIFEST_NAME)["provenance"]["healed"]
    assert said == said | {"lr": 2e-3, "loss": {"ce": 1}, "tokens": 8 * 24, "linear_dtype": "base"}
    assert said["upstream"] == hashes(read_master(tiny_model / "upstream").files.values())
    assert said["capture"] == hashes([folder / "capture" / "index.jsonl"])
    assert not {"seconds", "curve"} & said.keys() and str(folder) not in str(said)
    stored, names = load_tensors(upstream), changed(upstream, tiny_model / "upstream")
    assert names and not any(".ffn.experts." in n or ".gate." in n for n in names)
    assert said["trained"].keys() == {n for n in names if not n.endswith(".scale")}
    kinds = {str(stored[n].dtype) for n in said["trained"]}
    assert {f"torch.{kind}" for kind in said["trained"].values()} == kinds


def test_a_killed_training_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    def kill(_label: str, step: int, _steps: int) -> None:
        if step == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path / "run", report=kill)
    steps: list[int] = []
    run(folder=tmp_path / "run", report=lambda _label, step, _steps: steps.append(step))
    assert steps[0] == 11, "after the last look"
    (_, *again), (_, *whole) = (reported(f, "heal")["curve"] for f in (tmp_path / "run", run()))
    for found, expected in zip(again, whole, strict=True):
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
    more = tmp_path, "mxfp4", "base", 128, HealSection(device="cpu"), quiet
    with pytest.raises(GraftError, match="no text of split 'calibration' has more than 3 tokens"):
        heal(tmp_path / "capture", *models, *more)


def test_bf16_linears_come_out_as_bf16(run: Run) -> None:
    """The run ends with `verify`, which reads what the config says; `score` drafts with it."""
    found = reported(folder := run(*TRAINED), "heal")
    assert found["kept"]
    scored = reported(folder, "score")["acceptance"]["mxfp4"]
    assert scored["length"] == pytest.approx(found["after"]["length"])
    names = ["mtp.0.e_proj.weight", "mtp.0.h_proj.weight"]
    trained = load_tensors(folder / "heal" / HEALED, names)
    for name, stored in load_tensors(folder / SPLICED, names).items():
        assert stored.dtype == torch.bfloat16 == trained[name].dtype and stored.equal(trained[name])


def test_the_router_is_trained_if_asked_for(run: Run, tiny_model: Path) -> None:
    """And not by default, as above; the experts are as they were."""
    names = changed(run(*TRAINED) / "heal" / HEALED, tiny_model / "upstream")
    assert "mtp.0.ffn.gate.weight" in names and not any(".ffn.experts." in n for n in names)


def test_a_head_that_gains_nothing_goes_on_as_it_was(run: Run, tiny_model: Path) -> None:
    found = reported(folder := run(*QUICK, "heal.lr=1e-30"), "heal")
    assert not found["kept"] and found["gain"] == [0, 0]
    provenance = read_json(folder / SPLICED / MANIFEST_NAME)["provenance"]
    assert "healed" not in provenance
    assert provenance["upstream"] == hashes(read_master(tiny_model / "upstream").files.values())


@pytest.mark.parametrize(("gained", "kept"), [((3, 3, 3, 3), True), ((9, 9, -1, 0), False)])
def test_a_gain_within_its_interval_is_none(gained: tuple[int, ...], kept: bool) -> None:
    """Tokens more in ten steps of each text: on all alike, or as many and more on half of them."""
    texts = [[(20 + more, 10) for more in each] for each in ((0, 0, 0, 0), gained)]
    same = {"first": 0.8, "by_position": []}
    found = _judge([same | {"length": sum(n for n, _ in t) / 40, "texts": t} for t in texts])
    assert found["kept"] is kept and found["after"]["length"] > found["before"]["length"]


def test_recomputing_gives_the_same_loss_and_gradients(
    tiny_model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, base, batch = towards(tiny_model)
    parts = trained_parts(head, {"mtp.0.e_proj.weight"})
    computed, found = Mock(return_value=None), []
    head.layer.register_forward_pre_hook(computed)
    for recompute, times in ((False, 1), (True, 2)):
        with parametrize.cached():
            loss = distance(head, base, batch, {"kl": 1}, [1, 0.5], recompute=recompute)
            found.append([loss, *torch.autograd.grad(loss, [*parts.values()])])
        assert computed.call_count == 2 * times, "of each draft"
        computed.reset_mock()
    torch.testing.assert_close(*found)
    asked = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("mtp_graft.stages.heal.distance", asked)
    with pytest.raises(KeyboardInterrupt):
        run("heal.recompute=true")
    assert asked.call_args.kwargs == {"recompute": True}
