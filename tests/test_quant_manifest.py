"""What a checkpoint says about its head is true, readable, and the same every time."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.files import sha256
from mtp_graft.checkpoint.quant_manifest import QuantizeReport
from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.errors import GraftError
from mtp_graft.recipe import Variant
from mtp_graft.stages.splice import splice
from quantized import report, tiny_quantization, write_quantized

PROVENANCE = {"base": {"config.json": "0" * 64}, "upstream": {}}


def content(variant: Variant, known: bool = True) -> quant_manifest.Manifest:
    experts: Any = {"rtn": "int4", "gptq": "int4"}.get(variant, variant)
    quantization = add_head(tiny_quantization(), 4, experts, "base")
    config = {"num_hidden_layers": 4, "n_routed_experts": 64, "quantization_config": quantization}
    stage = cast(QuantizeReport, report(64)) if known else None
    return quant_manifest.manifest(variant, "base", config, stage, PROVENANCE, 612, 8_019_304)


@pytest.mark.parametrize(
    ("variant", "preserving", "bits"),
    [("rtn", False, 4), ("gptq", True, 4), ("mxfp4", True, 4), ("bf16", True, None)],
)
def test_only_calibrated_and_lossless_heads_claim_quality(
    variant: Variant, preserving: bool, bits: int | None
) -> None:
    found = content(variant)
    assert found["is_final_quality_preserving"] is preserving
    assert f"| is_final_quality_preserving | {preserving} |" in quant_manifest.manifest_text(found)
    assert (found["routed_experts"]["weights"] or {}).get("num_bits") == bits


def test_a_calibrated_head_states_damp_tokens_and_errors() -> None:
    found = content("gptq")
    calibration, errors = found["calibration"], found["rel_error"]
    assert calibration and errors
    assert (calibration["damp"], calibration["experts_without_tokens"]) == (0.01, [0])
    tokens = calibration["tokens_per_expert"]
    assert (tokens["min"], tokens["mean"], tokens["max"], tokens["zero"]) == (0, 315.0, 630, 1)
    assert errors["w2"]["max"] == pytest.approx(0.163) and errors["mean"] == 0.1315
    text = quant_manifest.manifest_text(found)
    assert "| calibration.tokens_per_expert.mean | 315.0 |" in text
    assert "| rel_error.w2.max | 0.163 |" in text


def test_the_recipe_is_the_bases_own_and_a_stage_for_the_head() -> None:
    own = "default_stage:\n  default_modifiers:\n    GPTQModifier: {dampening_frac: 0.1}"
    text = quant_manifest.recipe_text(content("gptq"), own)
    assert text.startswith(own + "\n")
    assert list(yaml.safe_load(text)) == ["default_stage", "mtp_head_stage"]
    stage = yaml.safe_load(quant_manifest.recipe_text(content("rtn", known=False), None))
    assert stage["mtp_head_stage"]["routed_experts"]["weights"]["group_size"] == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"not found; .*; run `mtp-graft quantize` to its end"),
        ("{", "not a quantize report"),
        ("{}", r"not a quantize report .*damp: field required"),
        ("[]", "not a quantize report"),
    ],
)
def test_an_unfinished_report_is_one_error(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(GraftError, match=rf"report\.json: {message}"):
        quant_manifest.read_report(tmp_path)


def test_the_same_inputs_give_the_same_bytes_and_hashes_without_paths_or_times(
    tiny_model: Path, tmp_path: Path
) -> None:
    texts = []
    for place in ("one", "two/deep"):
        base = shutil.copytree(tiny_model / "base", tmp_path / place / "base")
        upstream = shutil.copytree(tiny_model / "upstream", tmp_path / place / "upstream")
        quantized = write_quantized(tmp_path / place / "quantize", load_tensors(upstream))
        out = tmp_path / place / "out"
        splice(base, upstream, out, "gptq", quantized=quantized)
        names = (quant_manifest.MANIFEST_NAME, quant_manifest.MANIFEST_TEXT_NAME, "recipe.yaml")
        texts.append([(out / name).read_text() for name in names])
    assert texts[0] == texts[1]
    for text in texts[0]:
        assert not re.search(r"/(tmp|work|home)/|seconds|\b20\d\d-\d\d|\d\d:\d\d", text)
    found = json.loads(texts[0][0])["provenance"]
    assert list(found["base"]["shard_headers"]) == sorted(
        p.name for p in base.glob("*.safetensors")
    )
    assert found["base"]["config.json"] == sha256(base / "config.json")
    (head_shard,) = upstream.glob("*.safetensors")
    assert found["upstream"] == {head_shard.name: sha256(head_shard)}
    assert len(found["quantize"]["experts"]) == 2
