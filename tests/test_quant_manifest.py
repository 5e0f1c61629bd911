"""What a checkpoint says about its head is true, readable, and the same every time."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.files import sha256
from mtp_graft.checkpoint.quantization_config import add_head, base_quantization_config
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.variants import VARIANTS, Variant
from mtp_graft.errors import GraftError
from mtp_graft.stages.splice import splice
from quantized import report, write_quantized

PROVENANCE = {"base": {"config.json": "0" * 64}, "upstream": {}}


def content(variant: str, known: dict[str, Any] | None) -> dict[str, Any]:
    experts: Any = {"rtn": "int4", "gptq": "int4"}.get(variant, variant)
    quantization = add_head(base_quantization_config(), 4, experts, "base")
    config = {"num_hidden_layers": 4, "n_routed_experts": 64, "quantization_config": quantization}
    return quant_manifest.manifest(variant, "base", config, known, PROVENANCE, 612, 8_019_304)


@pytest.mark.parametrize(
    ("variant", "preserving"), [("rtn", False), ("gptq", True), ("mxfp4", True), ("bf16", True)]
)
def test_only_calibrated_and_lossless_heads_claim_quality(variant: str, preserving: bool) -> None:
    assert content(variant, report(64))["is_final_quality_preserving"] is preserving
    text = quant_manifest.manifest_text(content(variant, report(64)))
    assert f"| quality preserving | {'yes' if preserving else '**no**'} |" in text


def test_a_calibrated_head_states_damp_tokens_and_errors() -> None:
    found = content("gptq", report(64))
    assert found["calibration"]["damp"] == 0.01
    tokens = found["calibration"]["tokens_per_expert"]
    assert (tokens["min"], tokens["mean"], tokens["max"], tokens["zero"]) == (0, 315.0, 630, 1)
    assert found["calibration"]["experts_without_tokens"] == [0]
    assert found["rel_error"]["w2"]["max"] == pytest.approx(0.163)
    assert found["rel_error"]["mean"] == 0.1315
    text = quant_manifest.manifest_text(found)
    assert "min 0, mean 315.0, max 630; 1 experts without (policy: pool)" in text
    assert "| of w2 | mean 0.13150, max 0.16300 |" in text


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recipe_is_yaml_and_says_what_was_done(variant: Variant) -> None:
    text = quant_manifest.recipe_text(content(variant, report(64)), None)
    (modifier,) = yaml.safe_load(text)["mtp_head_stage"]["mtp_head_modifiers"].items()
    name, settings = modifier
    if variant in ("mxfp4", "bf16"):
        assert name == "KeptModifier"
        return
    group = settings["config_groups"]["mtp_experts"]
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 128)
    target, ignored = group["targets"][0], settings["ignore"][0]
    for module in ("mtp.0.ffn.experts.63.w2", "mtp.0.attn.wq_a", "mtp.0.ffn.shared_experts.w1"):
        is_expert = ".experts." in module
        assert bool(re.match(target.removeprefix("re:"), module)) is is_expert
        assert bool(re.match(ignored.removeprefix("re:"), module)) is not is_expert
    assert settings.get("dampening_frac") == (0.01 if variant == "gptq" else None)


def test_the_bases_own_recipe_is_kept() -> None:
    own = "default_stage:\n  default_modifiers:\n    GPTQModifier: {dampening_frac: 0.1}"
    text = quant_manifest.recipe_text(content("rtn", None), own)
    assert text.startswith(own + "\n")
    assert list(yaml.safe_load(text)) == ["default_stage", "mtp_head_stage"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"not found; .*; run `mtp-graft quantize` to its end"),
        ("{", "not a quantize report"),
        ("{}", r"not a report .*'variants'"),
        ("[]", "not a quantize report"),
    ],
)
def test_an_unfinished_report_is_one_error(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(GraftError, match=rf"report\.json: {message}"):
        quant_manifest.read_report(tmp_path)


def test_other_folders_give_the_same_bytes_and_no_path_or_time_gets_in(
    tiny_model: Path, tmp_path: Path
) -> None:
    texts = []
    for place in ("one", "two/deep"):
        folder = tmp_path / place
        shutil.copytree(tiny_model / "base", folder / "base")
        upstream = shutil.copytree(tiny_model / "upstream", folder / "upstream")
        quantized = write_quantized(folder / "quantize", load_tensors(upstream))
        splice(folder / "base", upstream, folder / "out", "gptq", quantized=quantized)
        names = (
            quant_manifest.MANIFEST_NAME,
            quant_manifest.MANIFEST_TEXT_NAME,
            quant_manifest.RECIPE_NAME,
        )
        texts.append([(folder / "out" / name).read_text() for name in names])
    assert texts[0] == texts[1]
    for text in texts[0]:
        assert not re.search(r"/(tmp|work|home)/|seconds|\b20\d\d-\d\d|\d\d:\d\d", text)


def test_hashes_are_of_the_inputs(tiny_model: Path, tmp_path: Path) -> None:
    base, upstream = tiny_model / "base", tiny_model / "upstream"
    splice(base, upstream, tmp_path / "out", "mxfp4", copy=True)
    stored = json.loads((tmp_path / "out" / quant_manifest.MANIFEST_NAME).read_text())
    found = stored["provenance"]
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert list(found["base"]["shard_headers"]) == shards
    assert found["base"]["config.json"] == sha256(base / "config.json")
    (head_shard,) = upstream.glob("*.safetensors")
    assert found["upstream"] == {head_shard.name: sha256(head_shard)}
    assert "quantize" not in found
