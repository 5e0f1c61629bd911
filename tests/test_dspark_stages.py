"""A DSpark drafter through the stages: replayed as served, quantized stage by stage, scored."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.dspark import DSpark, block_tokens
from mtp_graft.dsv4.replay import build_dspark
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.errors import GraftError
from mtp_graft.recipe import HealSection, QuantizeSection, ScoreSection
from mtp_graft.stages.heal import heal
from mtp_graft.stages.inputs import CALIBRATION, EVALUATION, Inputs, open_inputs
from mtp_graft.stages.parallel import Clock
from mtp_graft.stages.quantize import quantize, replay_capture
from mtp_graft.stages.score import score
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import verify
from synthetic_capture import Played, write_capture

SETTINGS = QuantizeSection(variants=("gptq", "mxfp4"), device="cpu", experts_per_batch=32)
ROWS = 5


def played(split: str, length: int, seed: int) -> Played:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4096, (length,), generator=generator)
    residual = torch.randn(length, 4, 256, generator=generator)
    return Played(split, 6, ids, residual, torch.randn(length, 3, 256, generator=generator))


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dspark") / "capture"
    texts = [played(CALIBRATION, 30, 0), played(CALIBRATION, 150, 1)]
    write_capture(folder, [*texts, played(EVALUATION, 25, 2), played(EVALUATION, 16, 3)])
    return folder


@pytest.fixture(scope="module")
def quantized(capture: Path, dspark: Path, tiny_base: Path) -> Path:
    out = capture.parent / "quantize"
    quantize(capture, dspark, tiny_base, out, SETTINGS, lambda *_: None)
    return out


def drafter_of(inputs: Inputs, *files: Path) -> DSpark:
    """Return the whole drafter, with the experts of some files."""
    tensors = decode_head(inputs.read_upstream([*inputs.head.files]))
    for file in files:
        tensors |= decode_head(load_file(file))
    return build_dspark(inputs.model, tensors, 3)


@torch.inference_mode()
def test_one_stage_at_a_time(capture: Path, quantized: Path, dspark: Path, tiny_base: Path) -> None:
    inputs = open_inputs(capture, dspark, tiny_base, CALIBRATION, "embed.weight")
    files = sorted((quantized / "gptq").glob("experts-0-*.safetensors"))
    routed = replay_capture(inputs, Clock("cpu"), lambda *_: None, 1, files)
    seen: list[Any] = []
    drafter: Any = drafter_of(inputs, *files)
    drafter.stages[1].mlp.experts.register_forward_pre_hook(lambda _, given: seen.append(given))
    embed = load_tensors(tiny_base, ["embed.weight"])["embed.weight"].float()
    for sequence in inputs.sequences:
        recorded = inputs.read_sequence(sequence)
        assert recorded.taps is not None
        context = drafter.context(recorded.taps.float(), torch.arange(sequence.tokens))
        anchors = torch.arange(6, sequence.tokens - 1)
        tokens = block_tokens(recorded.token_ids[anchors], drafter.noise, ROWS)
        drafter(embed[tokens], context, anchors, anchors)
    x, experts, weights = (torch.cat(each) for each in zip(*seen, strict=True))
    assert len(x) == ROWS * (23 + 143)
    torch.testing.assert_close(routed.x.float(), x, rtol=0.01, atol=0.01)
    for expert in range(64):
        row, column = (experts == expert).nonzero(as_tuple=True)
        parts = [*routed.of_expert(expert)]
        assert routed.counts[expert] == len(row)
        if len(row):
            torch.testing.assert_close(torch.cat([w for _, w in parts]), weights[row, column])


def test_dspark_is_spliced(quantized: Path, dspark: Path, tiny_base: Path, tmp_path: Path) -> None:
    splice(tiny_base, dspark, tmp_path / "out", "gptq", quantized=quantized)
    found = verify(tmp_path / "out", tiny_base, dspark, quantized)
    assert found["ok"] and 0.05 < found["rel_error_max"] < 0.35


@torch.inference_mode()
def test_each_k_is_as_served(capture: Path, quantized: Path, dspark: Path, tiny_base: Path) -> None:
    given = capture, quantized, dspark, tiny_base, Path("score")
    found = score(*given, SETTINGS, ScoreSection(k=3, device="cpu"), lambda *_: None)
    inputs = open_inputs(capture, dspark, tiny_base, EVALUATION, "embed.weight", "head.weight")
    drafter = drafter_of(inputs)
    base = load_tensors(tiny_base, ["embed.weight", "head.weight"])
    embed, lm_head = (base[name].float() for name in ("embed.weight", "head.weight"))
    for k in (1, 2, 3):
        accepted = steps = 0
        for sequence in inputs.sequences:
            recorded, at = inputs.read_sequence(sequence), 6
            assert recorded.taps is not None
            ids = recorded.token_ids
            while at + 1 < len(ids):  # a server's steps, one anchor at a time
                context = drafter.context(recorded.taps[:at].float(), torch.arange(at))
                anchor, rows = torch.tensor([at]), block_tokens(ids[at : at + 1], drafter.noise, k)
                hidden = drafter(embed[rows], context, anchor, anchor)
                made = drafter.draft(hidden, ids[at : at + 1], lm_head)[0].tolist()
                text = ids[at + 1 : at + 1 + k].tolist()
                right = next((n for n, t in enumerate(text) if t != made[n]), len(text))
                accepted, steps = accepted + right, steps + 1
                at += right + 1
        by_k = found["acceptance"]["mxfp4"]["by_k"][str(k)]
        assert (by_k["steps"], sum(by_k["accepted_by_position"])) == (steps, accepted)


def test_needs_taps_not_heal(capture: Path, quantized: Path, dspark: Path, tiny_base: Path) -> None:
    models, none = (quantized, dspark, tiny_base), lambda *_: None
    with pytest.raises(GraftError, match="a DSpark drafter, which was trained for blocks already"):
        heal(capture, *models, Path("heal"), "mxfp4", "base", 128, HealSection(), none)
    text = played(CALIBRATION, 30, 0)
    without = Played(text.split, 6, text.token_ids, text.residual)
    write_capture(Path("capture"), [without])
    with pytest.raises(GraftError, match="has not the taps of 3 layers"):
        quantize(Path("capture"), dspark, tiny_base, Path("out"), SETTINGS, none)


@pytest.mark.parametrize(
    ("change", "message"), [((), "on GPUs only"), (("heal.k=3",), r"\[heal\]")]
)
def test_a_run_that_would_end_in_an_error_is_refused_at_once(
    change: Any, message: str, run_command: Any, repo_root: Path, dspark: Path
) -> None:
    sets = [f"--set={each}" for each in (f'model.upstream="{dspark}"', *change)]
    recipe = repo_root / "recipes" / "tiny.toml"
    status, _, said = run_command("run", recipe, "--dry-run", "--run=run", *sets)
    assert status == 1 and re.search(f"has a DSpark drafter, .*{message}", said)
