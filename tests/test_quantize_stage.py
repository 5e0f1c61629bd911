"""The quantize stage on the tiny head: what it writes, resuming, and what it refuses."""

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file
from torch import Tensor

from mtp_graft.checkpoint.capture import read_recorded, read_sequences
from mtp_graft.checkpoint.shards import load_tensors, num_bytes, save_checkpoint
from mtp_graft.dsv4.experts import GptqRules
from mtp_graft.dsv4.replay import build_head, model_config, replay_routing
from mtp_graft.dsv4.variants import VARIANTS, decode_head, is_expert, store_head
from mtp_graft.errors import GraftError
from mtp_graft.quant import int4
from mtp_graft.quant.gptq import gptq
from mtp_graft.stages import quantize as stage
from mtp_graft.stages import routing
from mtp_graft.stages.quantize import QuantizeConfig, quantize
from references import unpack_int4
from synthetic_capture import random_sequences, write_capture

NUM_EXPERTS, HIDDEN, INTER = 64, 256, 256
CONFIG = QuantizeConfig()
LENGTHS = (40, 25, 60, 33)


KILLED_PROGRAM = """
import os, signal, sys
from pathlib import Path
from mtp_graft.stages.quantize import QuantizeConfig, quantize

def kill(label, units, total):
    if (label, units) == ("gptq", 16):
        os.kill(os.getpid(), signal.SIGKILL)

quantize(*map(Path, sys.argv[1:]), QuantizeConfig(), kill)
"""


class Killed(Exception):
    pass


def silent(label: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "capture"
    sequences = random_sequences(LENGTHS, hidden=HIDDEN, vocab=4096)
    sequences += random_sequences((30,), hidden=HIDDEN, vocab=4096, split="evaluation")
    write_capture(folder, sequences)
    return folder


@pytest.fixture(scope="module")
def run(tiny_model: Path, capture: Path) -> Callable[..., dict[str, Any]]:
    """Run the stage on the tiny model, everything overridable."""

    def run_quantize(out: Path, config: QuantizeConfig = CONFIG, **given: Any) -> dict[str, Any]:
        inputs = {
            "capture": capture,
            "upstream": tiny_model / "upstream",
            "base": tiny_model / "base",
            "report": silent,
        }
        return quantize(out=out, config=config, **{**inputs, **given})

    return run_quantize


@pytest.fixture(scope="module")
def done(run: Callable[..., dict[str, Any]], capture: Path) -> Path:
    """The folder of an uninterrupted run."""
    out = capture.parent / "quantize"
    run(out)
    return out


def stored_experts(out: Path) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for path in sorted((out / "gptq").glob("*.safetensors")):
        stored.update(load_file(path))
    return stored


def hashes(out: Path) -> dict[str, str]:
    units = sorted([*out.glob("replay/*"), *out.glob("gptq/*")])
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in units}


def test_experts_are_gptq_of_the_rows_that_reached_them(
    done: Path, capture: Path, tiny_model: Path
) -> None:
    """Everything again, one expert and one row at a time, Hessians in float64.

    Rows are those whose draft the text has: after its last two tokens there is nothing to draft.
    """
    decoded = decode_head(load_tensors(tiny_model / "upstream"))
    embed = load_tensors(tiny_model / "base", ["embed.weight"])["embed.weight"]
    config = model_config(json.loads((tiny_model / "base" / "config.json").read_text()))
    others = {n: t for n, t in decoded.items() if not is_expert(n.removesuffix(".weight"))}
    head = build_head(config, others, with_experts=False)
    rows: dict[int, list[Tensor]] = {3: [], 17: []}
    for sequence in read_sequences(capture)[: len(LENGTHS)]:
        recorded = read_recorded(capture, sequence, 4)
        routed = replay_routing(head, recorded.residual, embed[recorded.token_ids])
        known = slice(len(recorded.token_ids) - 2)
        rows_and_experts = routed.x[known].bfloat16(), routed.experts[known].tolist()
        for x, chosen in zip(*rows_and_experts, strict=True):
            for e in set(chosen) & set(rows):
                rows[e].append(x.double())
    stored = stored_experts(done)
    for e, inputs in rows.items():
        assert len(inputs) > 1
        w = {m: decoded[f"mtp.0.ffn.experts.{e}.{m}.weight"].double() for m in ("w1", "w2", "w3")}
        shared, down = torch.zeros(2, HIDDEN, HIDDEN, dtype=torch.float64)
        for x in inputs:
            gate = torch.minimum(w["w1"] @ x, torch.tensor(10.0))
            up = torch.maximum(torch.minimum(w["w3"] @ x, torch.tensor(10.0)), torch.tensor(-10.0))
            inner = gate / (1 + torch.exp(-gate)) * up
            shared += torch.outer(x, x)
            down += torch.outer(inner, inner)
        for matrix, hessian in (("w1", shared), ("w3", shared), ("w2", down)):
            damp = max(0.01, len(hessian) / len(inputs))
            expected = gptq(w[matrix][None].float(), hessian[None].float(), damp, scale="mse")
            stem = f"mtp.0.ffn.experts.{e}.{matrix}"
            codes = unpack_int4(stored[f"{stem}.weight_packed"])
            # Sums in another order move a few weights that lie close to a tie.
            assert (codes == expected.codes[0]).float().mean() > 0.99, stem
            torch.testing.assert_close(
                stored[f"{stem}.weight_scale"], expected.scale[0], rtol=0.02, atol=0
            )


def test_packing_is_that_of_compressed_tensors(done: Path) -> None:
    stored = stored_experts(done)
    assert len(stored) == 3 * 3 * NUM_EXPERTS
    for stem in ("mtp.0.ffn.experts.0.w1", "mtp.0.ffn.experts.63.w2"):
        codes = unpack_int4(stored[f"{stem}.weight_packed"])
        assert torch.equal(stored[f"{stem}.weight_packed"], pack_to_int32(codes, 4))
        assert stored[f"{stem}.weight_shape"].tolist() == list(codes.shape)
        assert stored[f"{stem}.weight_scale"].dtype == torch.bfloat16


def test_store_head_takes_the_experts(done: Path, tiny_model: Path) -> None:
    upstream = load_tensors(tiny_model / "upstream")
    head = store_head(upstream, "gptq", stored_experts(done))
    report = json.loads((done / "report.json").read_text())
    assert report["variants"]["gptq"]["bytes"] == sum(map(num_bytes, head.values()))


def test_report_has_the_size_of_every_variant(done: Path, tiny_model: Path) -> None:
    upstream = load_tensors(tiny_model / "upstream")
    report = json.loads((done / "report.json").read_text())
    for variant in ("rtn", "mxfp4", "bf16"):
        head = store_head(upstream, variant)
        assert report["variants"][variant]["bytes"] == sum(map(num_bytes, head.values())), variant


def test_report_has_sizes_counts_and_errors(done: Path) -> None:
    report = json.loads((done / "report.json").read_text())
    variants = report["variants"]
    assert [variants[v]["bits_per_weight"] for v in VARIANTS] == [4.125, 4.125, 4.25, 16.0]
    assert variants["gptq"]["rel_error"] < variants["rtn"]["rel_error"] < 0.2
    assert variants["mxfp4"]["rel_error"] == variants["bf16"]["rel_error"] == 0.0
    rows = sum(length - 2 for length in LENGTHS)
    tokens = report["tokens_per_expert"]
    assert report["calibration_tokens"] == rows
    assert sum(tokens["counts"]) == 6 * rows
    assert len(tokens["counts"]) == NUM_EXPERTS
    assert tokens["zero"] == tokens["counts"].count(0) == len(report["experts_without_tokens"])
    for variant in VARIANTS:
        errors = report["rel_errors"][variant]
        assert {m: len(errors[m]) for m in errors} == dict.fromkeys(("w1", "w2", "w3"), 64)
        mean = sum(map(sum, errors.values())) / (3 * NUM_EXPERTS)
        assert variants[variant]["rel_error"] == pytest.approx(mean)
    assert set(report["seconds"]) >= {"hessian", "gptq", "io"}
    assert report["peak_gpu_bytes"] == 0 < report["peak_host_bytes"]
    manifest = json.loads((done / "manifest.json").read_text())
    assert (manifest["stage"], manifest["status"]) == ("quantize", "done")


@pytest.mark.parametrize(("label", "at"), [("replay", 2), ("gptq", 0), ("gptq", 32)])
def test_killed_run_goes_on_where_it_was_and_ends_with_the_same_bytes(
    run: Callable[..., dict[str, Any]], done: Path, tmp_path: Path, label: str, at: int
) -> None:
    out = tmp_path / "quantize"

    def kill(current: str, units: int, total: int) -> None:
        if (current, units) == (label, at):
            raise Killed

    with pytest.raises(Killed):
        run(out, report=kill)
    before = {p: p.stat().st_mtime_ns for p in [*out.glob("replay/*"), *out.glob("gptq/*")]}
    assert before
    run(out)
    assert {p: p.stat().st_mtime_ns for p in before} == before, "a finished unit was redone"
    assert hashes(out) == hashes(done)


@pytest.mark.slow
def test_what_was_finished_before_a_kill_9_is_not_computed_again(
    run: Callable[..., dict[str, Any]],
    done: Path,
    capture: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """Files of rows are not synced, and need not be for this."""
    out = tmp_path / "quantize"
    inputs = (capture, tiny_model / "upstream", tiny_model / "base", out)
    command = [sys.executable, "-c", KILLED_PROGRAM, *map(str, inputs)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert len(list(out.glob("replay/*.safetensors"))) == len(LENGTHS)
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*.safetensors")}
    run(out)
    assert {p: p.stat().st_mtime_ns for p in before} == before, "a finished unit was redone"
    assert hashes(out) == hashes(done)


def test_rows_that_were_just_computed_are_not_read_again(
    run: Callable[..., dict[str, Any]],
    done: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that a killed run left are."""
    read: list[str] = []
    real = routing.read_tensors

    def reading(path: Path, *names: Any) -> dict[str, Tensor]:
        read.append(path.name)
        return real(path, *names)

    monkeypatch.setattr(routing, "read_tensors", reading)
    run(tmp_path / "whole")
    assert read == []
    out = tmp_path / "resumed"
    shutil.copytree(done, out)
    (out / "manifest.json").unlink()
    for unit in [*out.glob("gptq/*"), *(out / "replay" / f"00000{n}.safetensors" for n in (0, 2))]:
        unit.unlink()
    run(out)
    assert sorted(read) == ["000001.safetensors", "000003.safetensors"]
    assert hashes(out) == hashes(tmp_path / "whole") == hashes(done)


@pytest.mark.gpu
def test_rows_that_a_gpu_has_no_room_for_are_kept_in_host_memory(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = replace(CONFIG, device="cuda")
    run(tmp_path / "gpu", on_gpu)
    monkeypatch.setattr(routing, "RESIDENT_BYTES", 0)
    run(tmp_path / "host", on_gpu)
    assert hashes(tmp_path / "host") == hashes(tmp_path / "gpu")


def test_seconds_cover_the_whole_stage(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what comes after the last batch: the report."""
    real = stage._variants
    monkeypatch.setattr(stage, "_variants", lambda *given: (time.sleep(0.5), real(*given))[1])
    seconds = run(tmp_path / "q")["seconds"]
    assert seconds["total"] > 0.5 + sum(s for part, s in seconds.items() if part != "total")


def test_unit_that_a_crash_left_unreadable_is_made_again(
    run: Callable[..., dict[str, Any]], done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "quantize"
    shutil.copytree(done, out)
    (out / "manifest.json").unlink()
    for unit in (out / "replay" / "000001.safetensors", next(out.glob("gptq/*.safetensors"))):
        unit.write_bytes(unit.read_bytes()[:1000])
    run(out)
    assert hashes(out) == hashes(done)


def test_finished_stage_is_not_run_again(run: Callable[..., dict[str, Any]], done: Path) -> None:
    report = json.loads((done / "report.json").read_text())
    calls: list[str] = []
    assert run(done, report=lambda label, *_: calls.append(label)) == report
    assert not calls


def test_another_configuration_or_capture_is_refused(
    run: Callable[..., dict[str, Any]], done: Path, tmp_path: Path
) -> None:
    with pytest.raises(GraftError, match=r"begun with damp = 0\.01, now it is 0\.1"):
        run(done, replace(CONFIG, damp=0.1))
    other = tmp_path / "capture"
    write_capture(other, random_sequences(LENGTHS, hidden=HIDDEN, vocab=4096, seed=9))
    with pytest.raises(GraftError, match=r"begun with inputs\.index\.jsonl|inputs\.0000"):
        run(done, capture=other)


@pytest.fixture
def one_token(tmp_path: Path) -> Path:
    """A capture with two rows: most experts get no token."""
    folder = tmp_path / "capture"
    write_capture(folder, random_sequences((3,), hidden=HIDDEN, vocab=4096))
    return folder


def test_experts_without_tokens_share_all_tokens_under_pool(
    run: Callable[..., dict[str, Any]], one_token: Path, tmp_path: Path, tiny_model: Path
) -> None:
    out = tmp_path / "quantize"
    report = run(out, capture=one_token)
    empty = report["experts_without_tokens"]
    assert len(empty) >= NUM_EXPERTS - 12
    assert report["zero_token_policy"] == "pool"
    x = load_file(out / "replay" / "000000.safetensors")["x"].float()
    name = f"mtp.0.ffn.experts.{empty[0]}.w1"
    upstream = decode_head(load_tensors(tiny_model / "upstream"))
    damp = HIDDEN / len(x)  # as many as all experts together saw
    expected = gptq(upstream[f"{name}.weight"][None], (x.T @ x)[None], damp, scale="mse")
    codes = unpack_int4(stored_experts(out)[f"{name}.weight_packed"])
    assert (codes == expected.codes[0]).float().mean() > 0.99


def test_experts_without_tokens_are_rounded_under_rtn(
    run: Callable[..., dict[str, Any]], one_token: Path, tmp_path: Path, tiny_model: Path
) -> None:
    out = tmp_path / "quantize"
    config = replace(CONFIG, zero_tokens="rtn", scale="absmax")
    report = run(out, config, capture=one_token)
    rounded = store_head(load_tensors(tiny_model / "upstream"), "rtn")
    stored = stored_experts(out)
    for e in report["experts_without_tokens"]:
        for name in (n for n in stored if n.startswith(f"mtp.0.ffn.experts.{e}.")):
            assert torch.equal(stored[name], rounded[name]), name
    errors = report["rel_errors"]
    e = report["experts_without_tokens"][0]
    assert errors["gptq"]["w1"][e] == pytest.approx(errors["rtn"]["w1"][e])
    assert all(math.isfinite(v) for m in errors["rtn"].values() for v in m)


def test_experts_without_tokens_can_be_an_error(
    run: Callable[..., dict[str, Any]], one_token: Path, tmp_path: Path
) -> None:
    with pytest.raises(GraftError, match=r"mtp\.0\.ffn\.experts\.\d+: no token .* reached it"):
        run(tmp_path / "q", replace(CONFIG, zero_tokens="error"), capture=one_token)


def test_experts_with_fewer_tokens_than_inputs_are_quantized_and_reported(
    run: Callable[..., dict[str, Any]], one_token: Path, tmp_path: Path
) -> None:
    """Two rows: Hessians of rank one and two, which damping by tokens makes regular."""
    report = run(tmp_path / "q", capture=one_token)
    counts = report["tokens_per_expert"]["counts"]
    assert {0, 1} <= set(counts)
    assert report["experts_rank_deficient"] == list(range(NUM_EXPERTS))
    errors = report["rel_errors"]
    for e in (e for e, count in enumerate(counts) if count):
        assert errors["gptq"]["w1"][e] < errors["rtn"]["w1"][e]


def test_an_input_that_no_token_used_is_counted(
    run: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    """Upstream's norm before the experts is made to silence one input."""
    tensors = load_tensors(tiny_model / "upstream")
    tensors["mtp.0.ffn_norm.weight"][7] = 0
    (tmp_path / "upstream").mkdir()
    save_checkpoint(tensors, tmp_path / "upstream", 2**30)
    report = run(tmp_path / "q", upstream=tmp_path / "upstream")
    assert report["inputs_never_seen"] == {"w1": NUM_EXPERTS, "w2": 0, "w3": NUM_EXPERTS}


def test_fewer_tokens_are_damped_more() -> None:
    damps = GptqRules(damp=0.01, damping="tokens").damp_for([0, 1, 100, 10**6], 256)
    assert damps.tolist() == pytest.approx([256, 256, 2.56, 0.01])
    fixed = GptqRules(damp=0.01, damping="fixed").damp_for([0, 1, 100, 10**6], 256)
    assert fixed.tolist() == pytest.approx([0.01] * 4)


def test_replay_without_attention_gives_the_experts_the_stream_that_came_in(
    run: Callable[..., dict[str, Any]], capture: Path, tiny_model: Path, tmp_path: Path
) -> None:
    report = run(tmp_path / "q", replace(CONFIG, replay="identity"))
    assert report["replay"] == "attention skipped (identity residual)"
    decoded = decode_head(load_tensors(tiny_model / "upstream"))
    embed = load_tensors(tiny_model / "base", ["embed.weight"])["embed.weight"]
    config = model_config(json.loads((tiny_model / "base" / "config.json").read_text()))
    others = {n: t for n, t in decoded.items() if not is_expert(n.removesuffix(".weight"))}
    head = build_head(config, others, with_experts=False)
    recorded = read_recorded(capture, read_sequences(capture)[0], 4)
    seen: list[Tensor] = []
    hook = head.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    replay_routing(head, recorded.residual, embed[recorded.token_ids])
    hook.remove()
    with torch.no_grad():
        _, _, collapsed = head.layer.ffn_hc(seen[0])
        expected = head.layer.post_attention_layernorm(collapsed)[0]
    x = load_file(tmp_path / "q" / "replay" / "000000.safetensors")["x"]
    torch.testing.assert_close(x, expected[:-1].bfloat16(), rtol=0, atol=0.02)


def test_nan_in_the_capture_is_refused_with_its_place(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    sequences = random_sequences((10, 12), hidden=HIDDEN, vocab=4096)
    sequences[1].residual[7, 2, 5] = math.nan
    write_capture(tmp_path / "capture", sequences)
    with pytest.raises(GraftError, match=r"prompt 'prompt-1': not-finite residual at token 7"):
        run(tmp_path / "q", capture=tmp_path / "capture")


def test_capture_of_another_model_is_refused(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    write_capture(tmp_path / "a", random_sequences((10,), hidden=128, vocab=4096))
    with pytest.raises(GraftError, match="hidden size 128, expected 256"):
        run(tmp_path / "qa", capture=tmp_path / "a")
    sequences = random_sequences((10,), hidden=HIDDEN, vocab=4096)
    sequences[0].token_ids[3] = 4096
    write_capture(tmp_path / "b", sequences)
    with pytest.raises(GraftError, match="token 4096, expected less than 4096"):
        run(tmp_path / "qb", capture=tmp_path / "b")
    with pytest.raises(GraftError, match="no captured sequences of split 'calibration'"):
        run(tmp_path / "qc", capture=tmp_path / "none")


def test_group_size_that_does_not_divide_is_refused(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(GraftError, match=r"experts\.0\.w1: has 256 inputs, .* group size 96"):
        run(tmp_path / "q", replace(CONFIG, group_size=96))
    assert not (tmp_path / "q").exists()


def test_other_group_sizes_work(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = run(tmp_path / "q", replace(CONFIG, group_size=64))
    assert report["variants"]["gptq"]["bits_per_weight"] == 4.25
    scale = stored_experts(tmp_path / "q")["mtp.0.ffn.experts.0.w1.weight_scale"]
    assert list(scale.shape) == [INTER, HIDDEN // 64]


def test_upstream_of_another_shape_is_refused_by_name(
    run: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    tensors = load_tensors(tiny_model / "upstream")
    stem = "mtp.0.ffn.experts.5.w3"
    tensors[f"{stem}.weight"] = tensors[f"{stem}.weight"][:128].clone()
    tensors[f"{stem}.scale"] = tensors[f"{stem}.scale"][:128].clone()
    (tmp_path / "upstream").mkdir()
    save_checkpoint(tensors, tmp_path / "upstream", 2**30)
    with pytest.raises(
        GraftError, match=rf"{stem}\.weight: is \[128, 256\], expected \[256, 256\]"
    ):
        run(tmp_path / "q", upstream=tmp_path / "upstream")


def test_hessian_that_damping_does_not_save_names_the_expert(
    run: Callable[..., dict[str, Any]], one_token: Path, tmp_path: Path
) -> None:
    with pytest.raises(GraftError, match=r"experts\.0\.w1: its Hessian is not positive definite"):
        run(tmp_path / "q", replace(CONFIG, damp=0.0, damping="fixed"), capture=one_token)


def test_int4_decodes_to_what_the_errors_were_measured_on(done: Path, tiny_model: Path) -> None:
    stored = stored_experts(done)
    stem = "mtp.0.ffn.experts.9.w2"
    decoded = decode_head({n: t for n, t in stored.items() if n.startswith(stem)})
    codes = unpack_int4(stored[f"{stem}.weight_packed"])
    expected = int4.decode(codes, stored[f"{stem}.weight_scale"])
    assert torch.equal(decoded[f"{stem}.weight"], expected)
