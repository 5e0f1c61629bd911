"""What a checkpoint says about its head is true, readable, and the same every time."""

import re
from pathlib import Path

import pytest
import yaml

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.files import sha256
from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.errors import GraftError
from mtp_graft.recipe import Variant
from quantized import tiny_quantization
from run_folder import recorded

PROVENANCE = {"base": {"config.json": "0" * 64}, "upstream": {}}
REPORT = recorded("stages")["quantize/report.json"]
REPORT["rel_errors"]["gptq"]["w2"] = [0.1, 0.2, 0.3, 0.6]


def content(variant: Variant, known: bool = True) -> quant_manifest.Manifest:
    quantization = add_head(tiny_quantization(), 4, variant, "base")
    config = {"num_hidden_layers": 4, "n_routed_experts": 64, "quantization_config": quantization}
    report = REPORT if known else None
    return quant_manifest.manifest(variant, "base", config, report, PROVENANCE, 612, 8_019_304)


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
    assert (calibration["damp"], calibration["experts_without_tokens"]) == (0.01, [2, 3])
    tokens = calibration["tokens_per_expert"]
    assert [tokens[key] for key in ("min", "mean", "max", "zero")] == [0, 43951.75, 175376, 2]
    assert errors["w2"]["mean"] == pytest.approx(0.3) and errors["w2"]["max"] == 0.6
    assert errors["mean"] == 0.054
    text = quant_manifest.manifest_text(found)
    assert "| calibration.tokens_per_expert.mean | 43951.75 |" in text
    assert "| rel_error.w2.max | 0.6 |" in text


def test_the_recipe_is_the_bases_own_and_a_stage_for_the_head() -> None:
    own = "default_stage:\n  default_modifiers:\n    GPTQModifier: {dampening_frac: 0.1}"
    text = quant_manifest.recipe_text(content("gptq"), own)
    assert text.startswith(own + "\n")
    assert list(yaml.safe_load(text)) == ["default_stage", "mtp_head_stage"]
    stage = yaml.safe_load(quant_manifest.recipe_text(content("rtn", known=False), None))
    assert stage["mtp_head_stage"]["routed_experts"]["weights"]["group_size"] == 128


def test_a_report_without_a_part_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(GraftError, match=r"report\.json: not a quantize report .*damp: field req"):
        quant_manifest.read_report(tmp_path)


def test_origins_are_told_by_hashes_without_paths_or_times(
    tiny_model: Path, tiny_base: Path, spliced: dict[str, Path]
) -> None:
    for name in (quant_manifest.MANIFEST_NAME, quant_manifest.MANIFEST_TEXT_NAME, "recipe.yaml"):
        text = (spliced["gptq"] / name).read_text()
        assert not re.search(r"/(tmp|work|home)/|seconds|\b20\d\d-\d\d|\d\d:\d\d", text)
    found = quant_manifest.read_manifest(spliced["gptq"])["provenance"]
    shards = sorted(path.name for path in tiny_base.glob("*.safetensors"))
    assert list(found["base"]["shard_fingerprints"]) == shards
    assert found["base"]["config.json"] == sha256(tiny_base / "config.json")
    (head_shard,) = (tiny_model / "upstream").glob("*.safetensors")
    assert found["upstream"] == {head_shard.name: sha256(head_shard)}
    assert len(found["quantize"]["experts"]) == 2
