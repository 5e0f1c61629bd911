"""The scheme an engine finds for a module, what a manifest says, and the values of a config."""

import random
import re
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.files import sha256
from mtp_graft.checkpoint.quantization_config import add_head, read_quantization
from mtp_graft.dsv4.config import check_dimensions, compress_ratios, unread_keys
from mtp_graft.dsv4.names import base_shapes, head_shapes
from mtp_graft.errors import GraftError
from mtp_graft.recipe import Variant
from quantized import tiny_quantization
from run_folder import recorded
from serving.flash import CONFIG

EXPERT_MATRICES = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
VARIANTS: tuple[Variant, ...] = ("gptq", "mxfp4", "bf16")
FUSED = {"gate_up_proj": ["w1", "w3"], "fused_wqa_wkv": ["wq_a", "wkv"]}
FUSED |= {"fused_wkv_wgate": ["wkv", "wgate"]}


def test_the_heads_groups_match_no_other_layer_and_the_bases_section_stays() -> None:
    base = tiny_quantization()
    for variant, linear_dtype in product(VARIANTS, ("fp8", "base", "bf16")):
        config = add_head(base, 4, variant, linear_dtype)
        for layer, name in product((0, 14, 40, 44), CLASSES):  # some contain the head's number
            module = f"model.layers.{layer}.{name}"
            assert by_us(config).group_of(module) == by_us(base).group_of(module), module
    assert base == tiny_quantization()


TARGETS = (
    r"re:.*\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)$", r"re:.*\.attn\.(fused_wqa_wkv|wq_b|wo_b)$", "re:",
    r"re:.*\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$", "re:.*w[13]$", "re:.*wq_a$",
    "re:.*shared_experts.*", "re:model.layers.4", r"re:\p{L}+\.layers\.1\.", "re:.*Linear", "",
    "layers.1.attn.wq_a", "model.layers.1.attn.wkv", "layers.1.attn", "layers.4.attn.wq_b",
    "model.layers.4.attn.wq_b", "layers.1.ffn.shared_experts.w2", "layers.4.ffn.experts.0.w1",
    "model.layers.1.attn.fused_wqa_wkv", "Linear", "linear", "Embedding", "ColumnParallel",
    "RoutedExperts",
)  # fmt: skip
CLASSES = {
    "attn.fused_wqa_wkv": "MergedColumnParallelLinear",
    "attn.compressor.fused_wkv_wgate": "MergedColumnParallelLinear",
    "attn.wq_b": "ColumnParallelLinear",
    "attn.wo_a": "ColumnParallelLinear",
    "attn.wo_b": "RowParallelLinear",
    "attn.indexer.wq_b": "ReplicatedLinear",
    "e_proj": "ReplicatedLinear",
    "ffn.shared_experts.gate_up_proj": "MergedColumnParallelLinear",
    "ffn.shared_experts.down_proj": "RowParallelLinear",
    **{f"ffn.experts.0.{matrix}": "RoutedExperts" for matrix in EXPERT_MATRICES},
}
ARGUMENTS: dict[str, list[Any]] = {
    "num_bits": [3, 4, 4, 4, 4, 8, 8, 8],
    "type": ["int", "float"],
    "strategy": ["group", "group", "block", "tensor_group", "channel", "tensor"],
    "group_size": [16, 32, 64, 128, None],
    "block_structure": [None, [128, 128], [64, 128]],
    "symmetric": [True, True, False],
    "actorder": [*[None] * 8, "static", "group"],
}
FORMATS = ("pack-quantized", "pack-quantized", "float-quantized", "mxfp4-pack-quantized", None)
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


def random_section(rng: random.Random) -> dict[str, Any]:
    """Return one of one to three groups, which vLLM may refuse."""
    section: dict[str, Any] = {"quant_method": "compressed-tensors", "format": rng.choice(FORMATS)}
    groups = section["config_groups"] = {}
    for group in range(rng.randint(1, 3)):
        weights = {name: rng.choice(values) for name, values in ARGUMENTS.items()}
        if rng.random() < 0.9:  # one that fits its strategy
            by = weights["strategy"]
            weights["group_size"] = rng.choice([16, 32, 128]) if "group" in by else None
            weights["block_structure"] = [128, 128] if by == "block" else None
        targets = rng.sample(TARGETS, rng.randint(1, 5))
        groups[f"group_{group}"] = {"targets": targets, "weights": weights}
        groups[f"group_{group}"]["format"] = rng.choice(FORMATS)
        inputs = rng.choice([None, None, {}, DYNAMIC, STATIC])
        if not inputs and weights["type"] == "int":  # vLLM asserts it; for us a scheme in words
            groups[f"group_{group}"]["format"] = "pack-quantized"
        groups[f"group_{group}"]["input_activations"] = inputs
    return section | {"ignore": rng.sample(TARGETS, rng.choice([0, 0, 1, 2]))}


def by_vllm(section: dict[str, Any]) -> Any:
    """Return vLLM's reading, as its loader prepares it."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from vllm.models.deepseek_v4.cpu.model import _make_deepseek_v4_weights_mapper

    parsed = CompressedTensorsConfig.from_config(deepcopy(section))
    parsed.apply_vllm_mapper(_make_deepseek_v4_weights_mapper("bf16").get_rename_mapper())
    parsed.packed_modules_mapping = FUSED
    parsed._add_fused_moe_to_target_scheme_map()
    return parsed


def kind_in_vllm(parsed: Any, scheme: dict[str, Any]) -> str | None:
    """Return the kind that vLLM's choice of a method comes to, None for others."""
    weights, inputs = scheme["weights"], scheme["input_activations"]
    integers = {(4, True): "int4", (4, False): "int4-asymmetric", (8, True): "int8"}
    if parsed._is_mxfp4(weights):
        return "mxfp4"
    if parsed._is_nvfp4_format(weights):
        return "nvfp4"
    if parsed._is_wNa16_group_channel(weights, inputs) and scheme["format"] == "pack-quantized":
        kind = integers.get((weights.num_bits, weights.symmetric))
        return kind if weights.type == "int" else None
    is_fp8 = parsed._is_fp8_w8a16(weights, inputs) and scheme["format"] == "float-quantized"
    is_fp8 = is_fp8 and not (inputs and not inputs.dynamic)  # which vLLM asserts of blocks
    is_fp8 = is_fp8 and [weights.num_bits, weights.block_structure] == [8, [128, 128]]
    return "fp8" if is_fp8 else None


def read_by(read: Callable[[Any], Any], value: Any) -> Any:
    """Return what `read` makes of it, None if it is refused."""
    try:
        return read(deepcopy(value))
    except (ValueError, TypeError, NotImplementedError, AssertionError, GraftError, Warning):
        return None


def by_us(section: dict[str, Any]) -> Any:
    return read_quantization({"quantization_config": section})


def compare(section: dict[str, Any]) -> int:
    """Compare our reading with vLLM's; return how many modules found a scheme, -1 for refused."""
    theirs, ours = read_by(by_vllm, section), read_by(by_us, section)
    assert (theirs is None) == (ours is None), section
    if ours is None:
        return -1
    num_found = 0
    asked = {f"model.layers.{n}.{name}": of for n in (1, 4) for name, of in CLASSES.items()}
    for module, of_class in {**asked, "model.embed_tokens": "VocabParallelEmbedding"}.items():
        try:
            scheme = theirs.get_scheme_dict(type(of_class, (), {})(), module)
        except ValueError:
            with pytest.raises(GraftError, match="a part of"):
                ours.group_of(module)
            continue
        kind = ours.kind_of(ours.group_of(module))
        assert (kind == "plain") == (scheme is None), (section, module)
        if scheme is not None:
            num_found += 1
            expected = kind_in_vllm(theirs, scheme)
            assert kind == expected or (expected is None and "-bit" in kind), (section, module)
    return num_found


@pytest.mark.vllm
def test_vllm_finds_the_same_schemes_in_2000_sections_and_the_published_ones() -> None:
    rng = random.Random(21)
    found = [compare(random_section(rng)) for _ in range(2000)]
    assert found.count(-1) > 100 and sum(n > 0 for n in found) > 500
    for linear_dtype, variant in product(("fp8", "base"), VARIANTS):
        for base in (tiny_quantization(), CONFIG["quantization_config"]):
            assert compare(add_head(base, 4, variant, linear_dtype)) > 10


@pytest.mark.vllm
def test_vllm_finds_the_same_schemes_in_what_others_made_of_the_base() -> None:
    from serving.test_published import canada, ignore_by_pattern, null_formats, nvfp4

    assert compare(canada().config["quantization_config"]) > 10
    for change in (ignore_by_pattern, null_formats):
        change(section := deepcopy(CONFIG["quantization_config"]))
        assert compare(section) > 10
        assert compare(add_head(section, 4, "mxfp4", "fp8")) > 10
    assert compare(nvfp4().config["quantization_config"]) > 10


MUTATIONS: tuple[Any, ...] = (None, 0, -2, 4, 128.0, 1.5, "", "4", "foo", "group", "GROUP")
MUTATIONS += ("static", "64x64", [], [128], [128, "128"], {}, {"a": 1}, "torch.uint8")


@pytest.mark.vllm
@pytest.mark.parametrize("group", ["group_0", "group_1"])
def test_arguments_are_refused_as_compressed_tensors_and_vllm_refuse_them(group: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs

    names = ("extra", "dynamic", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    for name, value in product((*ARGUMENTS, *names), MUTATIONS):
        if (name, value) == ("block_structure", "4"):
            continue  # vLLM reads [4], which no layer takes
        section = tiny_quantization()
        arguments = section["config_groups"][group]["weights"]
        arguments[name] = value
        is_refused = read_by(by_vllm, section) is None
        assert (read_by(by_us, section) is None) == is_refused, (name, value)
        if read_by(QuantizationArgs.model_validate, arguments) is None:
            assert not read_by(by_us, tiny_quantization() | {"kv_cache_scheme": arguments}), name


def test_names_of_every_expert_are_looked_up_and_not_searched_for() -> None:
    names = [f"layers.{n}.ffn.experts.{e}.w1" for n in range(400) for e in range(256)]
    section = tiny_quantization()
    section["ignore"], section["config_groups"]["group_1"]["targets"] = names[1:], names[:1]
    config, start = by_us(section), time.process_time()
    found = {config.group_of(f"model.{name}") for name in names[:20_000]}
    found |= {config.group_of(f"model.layers.{n}.ffn.experts.0.w2") for n in range(2000)}
    assert found == {"group_1", None} and time.process_time() - start < 10


DENSE, INTS = {"format": "dense"}, {"num_bits": 4}


@pytest.mark.vllm
@pytest.mark.parametrize(
    "more",
    [
        *({"sparsity_config": v} for v in (None, {}, {"a": 1}, DENSE, DENSE | {"targets": []})),
        {"sparsity_config": DENSE | {"targets": ["Linear"]}},
        *({"transform_config": v} for v in (None, {}, {"foo": 1})),
        *({"config_groups": {"a": {"targets": t}}} for t in ([], ["Linear"], ["XAttention"], None)),
        {"config_groups": {"a": {"targets": ["Linear"], "weights": None}}},
        {"config_groups": {"a": {"targets": ["a", "XAttention"], "weights": None}}},
        {"config_groups": {"a": {"targets": ["re:a"], "weights": INTS, "output_activations": {}}}},
    ],
    ids=str,
)
def test_the_rest_of_a_section_is_refused_as_vllm_refuses_it(more: dict[str, Any]) -> None:
    section = tiny_quantization() | more
    assert (read_by(by_us, section) is None) == (read_by(by_vllm, section) is None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["config_groups"]["group_1"].update(weights=None), "weights: input should be"),
        (lambda c: c.update(sparsity_config=DENSE | {"targets": ["Linear"]}), "at most 0 items"),
        (lambda c: c.update(transform_config={"foo": 1}), "transform_config: input should be none"),
        (lambda c: c.update(ignore=["re:*shared*"]), r"ignore\.0: .*no regular expression"),
        (lambda c: c.update(format=8), "format: input should be a valid string"),
        (lambda c: c.update(ignore=["re:(((a{99}){99}){99})"]), "more than 10,000 repeats"),
    ],
)
def test_a_section_that_vllm_cannot_read_is_refused(change: Any, message: str) -> None:
    config = tiny_quantization()
    change(config)
    with pytest.raises(GraftError, match=message):
        read_quantization({"quantization_config": config})


PROVENANCE = {"base": {"config.json": "0" * 64}, "upstream": {}}
REPORT = recorded("stages")["quantize/report.json"]
REPORT["rel_errors"]["gptq"]["w2"] = [0.1, 0.2, 0.3, 0.6]


def content(variant: Any, known: bool = True) -> quant_manifest.Manifest:
    quantization = add_head(tiny_quantization(), 4, variant, "base")
    config = {"num_hidden_layers": 4, "n_routed_experts": 64, "quantization_config": quantization}
    report = REPORT if known else None
    return quant_manifest.manifest(variant, "base", config, report, PROVENANCE, 612, 8_019_304)


def test_only_calibrated_and_lossless_heads_claim_quality() -> None:
    for variant, bits in (("rtn", 4), ("gptq", 4), ("mxfp4", 4), ("bf16", None)):
        found = content(variant)
        claim = f"| is_final_quality_preserving | {variant != 'rtn'} |"
        assert found["is_final_quality_preserving"] is (variant != "rtn")
        assert claim in quant_manifest.manifest_text(found)
        assert (found["routed_experts"]["weights"] or {}).get("num_bits") == bits


def test_a_calibrated_head_states_damp_tokens_and_errors(tmp_path: Path) -> None:
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
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(GraftError, match=r"report\.json: not a quantize report .*damp: field req"):
        quant_manifest.read_report(tmp_path)


def test_the_recipe_is_the_bases_own_and_a_stage_for_the_head() -> None:
    own = "default_stage:\n  default_modifiers:\n    GPTQModifier: {dampening_frac: 0.1}"
    text = quant_manifest.recipe_text(content("gptq"), own)
    assert text.startswith(own + "\n")
    assert list(yaml.safe_load(text)) == ["default_stage", "mtp_head_stage"]
    stage = yaml.safe_load(quant_manifest.recipe_text(content("rtn", known=False), None))
    assert stage["mtp_head_stage"]["routed_experts"]["weights"]["group_size"] == 128


def test_origins_are_hashes(tiny_model: Path, tiny_base: Path, spliced: dict[str, Path]) -> None:
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


VALUES = [
    *((name, None) for name in ("qk_rope_head_dim", "scoring_func", "rope_theta", "swiglu_limit")),
    *((name, None) for name in ("num_key_value_heads", "routed_scaling_factor")),
    *(("architectures", value) for value in (["LlamaForCausalLM"], "DeepseekV4ForCausalLM", [])),
    *((name, None) for name in ("topk_method", "n_shared_experts", "norm_topk_prob")),
    *(("index_topk", 0), ("hc_sinkhorn_iters", 2.5), ("hidden_act", "gelu"), ("rope_theta", -1)),
    *(("vision_n_layers", 2), ("rms_norm_eps", float("nan")), ("hc_eps", "1e-6")),
    *(("rope_scaling", value) for value in (["yarn"], {"factor": "16"})),
    *(("hidden_size", 10**9), ("num_hidden_layers", 4096), ("vocab_size", "9" * 10**6)),
    *(("torch_dtype", "foo"), ("dtype", 16)),
]


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_values_that_no_model_has_are_one_short_error(name: str, value: Any) -> None:
    with pytest.raises(GraftError, match=rf"config\.json: {name}.* is .*; expected") as error:
        check_dimensions(CONFIG | {name: value})
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["index_topk", "hc_eps", "hc_sinkhorn_iters", "norm_topk_prob"])
def test_a_key_without_a_value_in_vllm_0_32_may_be_absent_for_0_33_alone(key: str) -> None:
    check_dimensions(config := {k: v for k, v in CONFIG.items() if k != key})
    assert [unread_keys(config, release) for release in ((0, 32), (0, 33))] == [f"no {key}", ""]
    for needed in ("architectures", "topk_method"):
        with pytest.raises(GraftError, match=f"has no '{needed}'"):
            check_dimensions({k: v for k, v in CONFIG.items() if k != needed})


def test_what_transformers_takes_for_absent_keys_is_read_so() -> None:
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention"}
    kinds[128] = "heavily_compressed_attention"
    absent = ("compress_ratios", "compress_rates", "num_hash_layers", "mlp_layer_types")
    types = [kinds[ratio] for ratio in CONFIG["compress_ratios"][: CONFIG["num_hidden_layers"]]]
    config = {k: v for k, v in CONFIG.items() if k not in absent} | {"layer_types": types}
    for same in (config, config | {"compress_rates": None}):
        assert base_shapes(same) == base_shapes(CONFIG)
    hashed = {k: v for k, v in CONFIG.items() if k not in (*absent[2:], "layer_types")}
    assert [unread_keys(hashed, r) for r in ((0, 32), (0, 33))] == ["no num_hash_layers", ""]


def test_the_largest_dimensions_that_pass_have_shapes_that_torch_can_hold() -> None:
    bounds = {"head_dim", "hidden_size", "vocab_size", "o_lora_rank", "q_lora_rank"}
    bounds |= {"num_attention_heads", "moe_intermediate_size", "index_head_dim", "index_n_heads"}
    config = CONFIG | dict.fromkeys(bounds, 2**20) | {"num_hidden_layers": 1}
    config |= {"compress_ratios": [128], "o_groups": 1, "n_routed_experts": 1, "hc_mult": 512}
    for name, shape in (base_shapes(config) | head_shapes(config)).items():
        assert torch.empty(shape, device="meta").nbytes > 0, name
    for ratio in (10**9, 1, 8, -4, True, 4.0):
        assert compress_ratios({"compress_ratios": [ratio]}) is None
