"""The quantize stage on the tiny head: what it writes, resuming, and what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtp_graft.checkpoint.capture import read_recorded, read_sequences
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.replay import build_head, model_config, replay_routing
from mtp_graft.dsv4.variants import decode_head, store_head
from mtp_graft.errors import GraftError
from mtp_graft.quant.gptq import gptq
from mtp_graft.recipe import ALL_VARIANTS, QuantizeSection
from mtp_graft.stages import quantize as stage
from mtp_graft.stages.inputs import open_inputs
from mtp_graft.stages.parallel import Clock
from mtp_graft.stages.quantize import quantize, replay_capture
from quantized import TINY, UPSTREAM, hashes, read_json, write_checkpoint
from references import unpack_int4
from serving.bench_server import quiet
from synthetic_capture import random_sequences, write_capture

NUM_EXPERTS, HIDDEN = 64, 256
SETTINGS = QuantizeSection(device="cpu")
LENGTHS = (40, 25, 60, 33)
EXPERT = "mtp.0.ffn.experts."
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "capture"
    texts = random_sequences(LENGTHS) + random_sequences((30,), split="evaluation")
    write_capture(folder, texts)
    return folder


@pytest.fixture(scope="module")
def run(capture: Path) -> Run:
    def run_quantize(
        out: Path, capture: Any = capture, upstream: Any = UPSTREAM, report: Any = quiet, **how: Any
    ) -> dict[str, Any]:
        return quantize(capture, upstream, TINY / "base", out, replace(SETTINGS, **how), report)

    return run_quantize


@pytest.fixture(scope="module")
def done(run: Run, capture: Path) -> Path:
    run(capture.parent / "quantize")
    return capture.parent / "quantize"


@pytest.fixture(scope="module")
def upstream(tiny_model: Path) -> dict[str, Tensor]:
    return load_tensors(tiny_model / "upstream")


def stored_experts(out: Path) -> dict[str, Tensor]:
    files = sorted((out / "gptq").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_gptq_uses_own_tokens_alone(done: Path, capture: Path, upstream: dict[str, Tensor]) -> None:
    """Everything again, one expert and one token at a time, Hessians in float64.

    The tokens are those whose draft the text has: after its last two there is nothing to draft.
    """
    config = model_config(json.loads((TINY / "base" / "config.json").read_text()))
    others = {name: tensor for name, tensor in upstream.items() if ".experts." not in name}
    head = build_head(config, decode_head(others), with_experts=False)
    embed = load_tensors(TINY / "base", ["embed.weight"])["embed.weight"]
    tokens: dict[int, list[Tensor]] = {3: [], 17: []}
    for sequence in read_sequences(capture)[: len(LENGTHS)]:
        recorded = read_recorded(capture, sequence, 4)
        found, experts, _ = replay_routing(head, recorded.residual, embed[recorded.token_ids])
        known = slice(len(recorded.token_ids) - 2)
        for x, chosen in zip(found[known].bfloat16(), experts[known], strict=True):
            for e in set(chosen.tolist()) & set(tokens):
                tokens[e].append(x.double())
    decoded, stored = decode_head(upstream), stored_experts(done)
    for e, inputs in tokens.items():
        assert len(inputs) > 1
        w = {m: decoded[f"{EXPERT}{e}.{m}.weight"].double() for m in ("w1", "w2", "w3")}
        h13, h2 = torch.zeros(2, HIDDEN, HIDDEN, dtype=torch.float64)
        for x in inputs:
            gate, up = (w["w1"] @ x).clamp(max=10), (w["w3"] @ x).clamp(-10, 10)
            read_by_w2 = gate / (1 + torch.exp(-gate)) * up
            h13 += torch.outer(x, x)
            h2 += torch.outer(read_by_w2, read_by_w2)
        for matrix, hessian in (("w1", h13), ("w3", h13), ("w2", h2)):
            damp = max(0.01, len(hessian) / len(inputs))
            expected = gptq(w[matrix][None].float(), hessian[None].float(), damp, scale="mse")
            module = f"{EXPERT}{e}.{matrix}"
            codes = unpack_int4(stored[f"{module}.weight_packed"])
            # Sums in another order move a few weights that lie close to a tie.
            assert (codes == expected.codes[0]).float().mean() > 0.99, module
            scale = stored[f"{module}.weight_scale"]
            torch.testing.assert_close(scale, expected.scale[0], rtol=0.02, atol=0)


def test_report_has_sizes_token_counts_and_errors(done: Path, upstream: dict[str, Tensor]) -> None:
    report = read_json(done / "report.json")
    variants, tokens = report["variants"], report["tokens_per_expert"]
    assert [variants[v]["bits_per_weight"] for v in ALL_VARIANTS] == [4.125, 4.125, 4.25, 16.0]
    assert variants["gptq"]["rel_error"] < variants["rtn"]["rel_error"] < 0.2
    assert variants["mxfp4"]["rel_error"] == variants["bf16"]["rel_error"] == 0.0
    for variant in ALL_VARIANTS:
        head = store_head(upstream, variant, stored_experts(done))
        assert variants[variant]["bytes"] == sum(t.nbytes for t in head.values()), variant
        errors = report["rel_errors"][variant]
        assert {m: len(errors[m]) for m in errors} == dict.fromkeys(("w1", "w2", "w3"), 64)
        mean = sum(map(sum, errors.values())) / (3 * NUM_EXPERTS)
        assert variants[variant]["rel_error"] == pytest.approx(mean)
    known = sum(length - 2 for length in LENGTHS)
    assert report["calibration_tokens"] == known and sum(tokens["counts"]) == 6 * known
    assert tokens["zero"] == tokens["counts"].count(0) == len(report["experts_without_tokens"])
    assert set(report["seconds"]) >= {"hessian", "gptq", "io", "pack", "total"}
    assert report["peak_gpu_bytes"] == 0 < report["peak_host_bytes"]
    assert json.loads((done / "manifest.json").read_text())["status"] == "done"


def test_a_run_that_stopped_ends_with_the_same_bytes(run: Run, done: Path, tmp_path: Path) -> None:
    def stop(label: str, done: int, _total: int) -> None:
        if (label, done) == ("gptq", 48):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, report=stop)
    torn, *kept = sorted(tmp_path.glob("gptq/*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:1000])  # as a power cut may leave it
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len(before) == 2
    run(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == before, "a batch was redone"
    assert hashes(tmp_path / "gptq") == hashes(done / "gptq")


def test_a_finished_stage_refuses_other_inputs(run: Run, done: Path, tmp_path: Path) -> None:
    assert run(done, report=lambda *_: pytest.fail("it was run")) == read_json(done / "report.json")
    with pytest.raises(GraftError, match=r"begun with damp = 0\.01, now it is 0\.1"):
        run(done, damp=0.1)
    write_capture(tmp_path, random_sequences(LENGTHS, seed=9))
    with pytest.raises(GraftError, match=r"begun with inputs\."):
        run(done, capture=tmp_path)


@pytest.fixture(scope="module")
def one_token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of three tokens, one of them to calibrate on: most experts get none."""
    folder = tmp_path_factory.mktemp("short")
    write_capture(folder, random_sequences((3,)))
    return folder


def test_unreached_share_all_tokens(run: Run, one_token: Path, upstream: dict[str, Tensor]) -> None:
    """Hessians have rank one; damping by tokens makes them regular."""
    report = run(Path(), capture=one_token)
    empty, errors = report["experts_without_tokens"], report["rel_errors"]
    assert len(empty) >= NUM_EXPERTS - 12
    for e in set(range(NUM_EXPERTS)) - set(empty):
        assert errors["gptq"]["w1"][e] < errors["rtn"]["w1"][e]
    models = TINY / "upstream", TINY / "base"
    inputs = open_inputs(one_token, *models, "calibration", "embed.weight")
    x = replay_capture(inputs, Clock("cpu"), lambda *_: None).x.float()  # all that was seen
    module = f"{EXPERT}{empty[0]}.w1"
    weight = decode_head(upstream)[f"{module}.weight"]
    damp = HIDDEN / len(x)  # as many as all experts together saw
    expected = gptq(weight[None], (x.T @ x)[None], damp, scale="mse")
    codes = unpack_int4(stored_experts(Path())[f"{module}.weight_packed"])
    assert (codes == expected.codes[0]).float().mean() > 0.99


def test_settings_that_do_not_work_are_named(run: Run, one_token: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=r"\.0\.w1: 256 inputs are no multiple of .* size 96"):
        run(tmp_path / "96", capture=one_token, group_size=96)
    with pytest.raises(GraftError, match=r"experts\.0\.w1: .* not positive definite"):
        run(tmp_path / "0", capture=one_token, damp=0.0, damping="fixed")


def test_a_capture_of_another_model_or_split_is_refused(run: Run, tmp_path: Path) -> None:
    for key, value, message in (
        ("hidden", 128, "hidden size 128 and token"),
        ("vocab", 9000, r"token \d+, expected 256 and less than 4096"),
        ("split", "evaluation", "no captured sequences of split 'calibration'"),
    ):
        write_capture(tmp_path / key, random_sequences((10, 12), **{key: value}))
        with pytest.raises(GraftError, match=message):
            run(tmp_path / f"out-{key}", capture=tmp_path / key)


def test_another_upstream_is_refused(run: Run, upstream: dict[str, Tensor], tmp_path: Path) -> None:
    module = f"{EXPERT}5.w3"
    cut = {n: upstream[n][:128].clone() for n in (f"{module}.weight", f"{module}.scale")}
    write_checkpoint({**upstream, **cut}, tmp_path)
    with pytest.raises(GraftError, match=rf"{module}\.weight is \[128, 256\], expected \[256, 2"):
        run(tmp_path / "q", upstream=tmp_path)


@pytest.mark.gpu
def test_tokens_may_stay_on_host(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "gpu", device="cuda")
    monkeypatch.setattr(stage, "RESIDENT_BYTES", 0)
    run(tmp_path / "host", device="cuda")
    assert hashes(tmp_path / "host/gptq") == hashes(tmp_path / "gpu/gptq")
