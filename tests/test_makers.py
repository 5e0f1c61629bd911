"""Who made a checkpoint is named, once; what vLLM serves of others passes, all else is named."""

import json
import re
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.checkpoint.files import read_object
from mtp_graft.checkpoint.makers import expect_format
from mtp_graft.checkpoint.quantization_config import QuantizationConfig
from mtp_graft.checkpoint.shards import INDEX_NAME, read_weight_map, save_shard, write_index
from mtp_graft.dsv4.names import base_shapes, from_vllm, head_shapes
from mtp_graft.errors import GraftError
from mtp_graft.pipeline import find_bundled_recipe
from mtp_graft.pipeline.plan import read_models
from mtp_graft.recipe import load_recipe
from mtp_graft.serving.command import ServeOptions, build_command, vllm_elsewhere
from mtp_graft.serving.doctor import diagnose
from mtp_graft.serving.doctor.checkpoint import canonical_name, read_checkpoint
from mtp_graft.serving.doctor.hardware import Target
from mtp_graft.serving.plan import make_plan
from mtp_graft.serving.topology import CPU, undivided
from mtp_graft.stages.fetch import find_source
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import verify
from serving import doctor_defects as defects
from serving.doctor_defects import ON_GPU, Tensors, edit_config, edit_shard, errors

TINY = Path(__file__).parents[1] / "models" / "tiny-dsv4"
CONFIG: dict[str, Any] = json.loads((TINY / "base" / "config.json").read_text())
NAMES = [*read_weight_map(TINY / "base" / INDEX_NAME)]
V32, V33 = (Target(Version(v), p, None) for v, p in (("0.32.0", "cpu"), ("0.33.0", "cuda")))
Make = Callable[[Path, dict[str, Any], list[str]], object]


def has(file: str) -> Make:
    return lambda folder, *_: (folder / file).write_text("{}")


def says(method: str, **more: Any) -> Make:
    section = {"quant_method": method, **more}
    return lambda _, config, __: config.update(quantization_config=section)


def names(pattern: str, replacement: str | None) -> Make:
    """Rename tensors, or leave them out."""

    def edit(_folder: Path, _config: dict[str, Any], found: list[str]) -> None:
        kept = [n for n in found if replacement is not None or not re.search(pattern, n)]
        found[:] = dict.fromkeys(re.sub(pattern, replacement or "", n) for n in kept)

    return edit


MAKERS: dict[str, Make] = {
    "ModelOpt": has("hf_quant_config.json"),
    "NVIDIA ModelOpt": says("fp8", moe_quant_algo="NVFP4"),
    "merge": has("mergekit_config.yml"),
    "DeepSeek's own FP8 and MXFP4": says("fp8"),
    "gptq": says("gptq"),
    "something_new": says("something_new"),
    "compressed-tensors' NVFP4": names(r"weight_shape$", "weight_global_scale"),
    "GPTQ": names(r"weight_(packed|shape)$", "g_idx"),
    "AWQ": names(r"weight_(packed|shape)$", "qzeros"),
    "MLX": names(r"weight_(packed|shape)$", "biases"),
    "ML": lambda _, c, __: c.update(quantization={}, quantization_config=None),  # MLX too
    "pruned variant: has 40, n_routed": names(r"experts\.(4|5|6)\d\.", None),
    "pruned variant: has 3, num_hidden": names(r"layers\.1\.", None),
}


def write(folder: Path, makers: Iterable[str], *, index: bool = True, experts: int = 64) -> Path:
    """Write the tiny base's names as these makers would have them, a value each."""
    folder.mkdir(exist_ok=True)
    config, found = CONFIG | {"n_routed_experts": experts}, list(NAMES)
    for maker in makers:
        MAKERS[maker](folder, config, found)
    tensors = {n: torch.zeros(64 if n.endswith("gate.weight") else 1) for n in found}
    save_shard(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if index:
        write_index(dict.fromkeys(found, "model.safetensors"), 0, folder)
    return folder


def check_named_once(folder: Path, *makers: str) -> None:
    (finding,) = diagnose(folder, V32)
    assert finding.id in ("foreign-format", "pruned") and not finding.fixable
    assert any(maker in finding.found for maker in makers), finding.found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(MAKERS)), min_size=1, unique=True), st.booleans())
def test_any_mixture_of_marks_is_one_finding_and_no_fix(makers: list[str], index: bool) -> None:
    index = index or all("pruned" in maker for maker in makers)  # config and index tell
    with TemporaryDirectory() as name:
        folder = write(Path(name), makers, index=index)
        check_named_once(folder, *makers)
        with pytest.raises(GraftError, match="expected a W4A16-FP8"):
            expect_format(folder, "base")


@pytest.mark.parametrize("maker", ["GGUF", "gguf/GGUF", "GPTQ"])
def test_every_command_names_the_maker_first(tmp_path: Path, tiny_base: Path, maker: str) -> None:
    given, out, master = tmp_path / "given", tmp_path / "out", TINY / "upstream"
    if "GGUF" in maker:
        file = given / f"{maker.lower()}.{maker[:4]}"
        with pytest.raises(GraftError, match="not a folder"):
            diagnose(file, V32)
        file.parent.mkdir(parents=True)
        file.touch()
        maker = maker[-4:]
        check_named_once(given, maker)
        check_named_once(file, maker)
    else:
        write(given, [maker])
    # A router of more experts than there are.
    pruned = write(tmp_path / "pruned", ["pruned variant: has 40, n_routed"], experts=40)
    check_named_once(pruned, "pruned variant: has 40, n_routed_experts is 64")
    for command in (
        lambda: find_source(str(given), None, "base"),
        lambda: find_source(str(given), None, "head"),
        lambda: splice(given, master, out),
        lambda: splice(tiny_base, given, out),
        lambda: build_command(ServeOptions(given), vllm_elsewhere("cpu")),
        lambda: make_plan(ServeOptions(given), "auto", CPU),
    ):
        with pytest.raises(GraftError, match=rf"given: is .*{maker}.*; expected"):
            command()


def transformers_config(config: dict[str, Any]) -> None:
    section = config.pop("quantization_config")
    saved = DeepseekV4Config(**config).to_dict() | {"quantization_config": section}
    config.clear()
    config |= json.loads(json.dumps(saved, default=str))


def test_transformers_config_is_read_as_vllm_reads_it(base: Path, tmp_path: Path) -> None:
    edit_config(base, transformers_config)
    config = json.loads((base / "config.json").read_text())
    assert "num_hash_layers" not in config and base_shapes(config) == base_shapes(CONFIG)
    splice(base, TINY / "upstream", tmp_path / "out", "mxfp4")
    for folder in (base, tmp_path / "out"):
        errors = [[f.id for f in diagnose(folder, on) if f.severity != "note"] for on in (V32, V33)]
        assert errors == [["config-dialect"], []]
        build_command(ServeOptions(folder), vllm_elsewhere("cuda"))
        with pytest.raises(GraftError, match="has layer_types and mlp_layer_types; expected"):
            build_command(ServeOptions(folder), vllm_elsewhere("cpu"))


@given(
    st.sampled_from([*base_shapes(CONFIG), *head_shapes(CONFIG)]), st.sampled_from(["", "model."]),
    st.sampled_from(["scale", "weight_scale_inv", "weight_scale"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_every_spelling_of_a_name_is_read_as_the_same(
    name: str, prefix: str, scale: str, experts_of_transformers: bool, head_as_layer: bool
) -> None:
    for right in (name, re.sub(r"weight$", "weight_scale", name)):
        other = re.sub(r"weight_scale$", scale, right)
        if experts_of_transformers:
            other = re.sub(r"\bw[123]\b", lambda match: defects.OTHER_NAMES[match[0]], other)
        if head_as_layer:  # as vLLM's drafter calls it
            other = re.sub(r"^mtp\.0\.norm", "layers.4.shared_head.norm", other)
            other = re.sub(r"^mtp\.0\.(?=attn|ffn|hc_[af])", "layers.4.mtp_block.", other)
            other = re.sub(r"^mtp\.0\.", "layers.4.", other)
        assert canonical_name(prefix + other, 4) == right == canonical_name(right, 4)


OWN = {r"^": "model.", r"^embed": "embed_tokens", r"\.gate\.bias$": ".gate.e_score_correction_bias"}
OWN |= {r"shared_experts\.w2": "shared_experts.down_proj", r"^head": "lm_head"}
OWN |= {r"\bw1\b": "gate_proj", r"\.attn\.": ".self_attn.", r"weight$": "weight_scale_inv"}


@pytest.mark.vllm
@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*base_shapes(CONFIG)]), st.lists(st.sampled_from([*OWN]), unique=True))
def test_a_name_is_misnamed_where_vllm_takes_it_for_another(name: str, edits: list[str]) -> None:
    from vllm.models.deepseek_v4.cpu.model import _make_deepseek_v4_weights_mapper

    found = name
    for pattern in sorted(edits, key=[*OWN][::-1].index):
        found = re.sub(pattern, OWN[pattern], found)
    if canonical_name(found, 4) == name:
        by_vllm = _make_deepseek_v4_weights_mapper("bf16")._map_name
        assert (name in (found, from_vllm(found))) == (by_vllm(found) == by_vllm(name)), found


VLLMS = {r"gate\.bias$": "gate.e_score_correction_bias", r"^embed\.": "embed_tokens."}
VLLMS |= {r"^(?!head\.|mtp\.)": "model."}


def as_vllm(tensors: Tensors) -> Tensors:
    """Rename a base's tensors to vLLM's own names, and its routers' biases."""
    for own, theirs in VLLMS.items():
        tensors = {re.sub(own, theirs, name): tensor for name, tensor in tensors.items()}
    return tensors


def with_exponents(tensors: Tensors) -> Tensors:
    """Round the scales of FP8 to powers of two, stored as such."""
    is_scale = {n: ".attn." in n and n.endswith("_scale") for n in tensors}
    return {n: t.to(torch.float8_e8m0fnu) if is_scale[n] else t for n, t in tensors.items()}


def without_shapes(tensors: Tensors) -> Tensors:
    return {n: t for n, t in tensors.items() if not n.endswith("weight_shape")}


def in_every_shard(change: Callable[[Tensors], Tensors]) -> defects.Plant:
    def plant(base: Path) -> None:
        for name in {s: n for n, s in read_weight_map(base / defects.INDEX).items()}.values():
            edit_shard(base, change, name)

    return plant


def name_layers(prefix: str) -> defects.Plant:
    matrices = product(range(4), ("wq_a", "wkv", "wq_b", "wo_a", "wo_b"))
    targets = [f"{prefix}layers.{n}.attn.{w}" for n, w in (*matrices, (2, "indexer.wq_b"))]
    return defects.retarget("group_0", targets)


def spell_as_vllm(config: Any) -> None:
    section = config["quantization_config"] | {"quant_method": "COMPRESSED_TENSORS"}
    section["config_groups"]["group_1"]["weights"]["group_size"] = 128.0
    config |= {"compression_config": section, "quantization_config": None}


@pytest.mark.parametrize(
    ("plant", "variant"),
    [
        *((in_every_shard(c), "mxfp4") for c in (as_vllm, with_exponents, without_shapes)),
        *((name_layers(prefix), "bf16") for prefix in ("", "model.")),
        *((defects.ignore(pattern), "mxfp4") for pattern in ("re:.*mtp.*", "mtp.0.e_proj")),
        (lambda base: edit_config(base, spell_as_vllm), "rtn"),
    ],
)
def test_what_vllm_reads_as_well_is_spliced(base: Path, plant: defects.Plant, variant: Any) -> None:
    """Names and dtypes: each was served on a CPU, at the acceptance of the original."""
    plant(base)
    for target in (ON_GPU, defects.ON_CPU):
        assert not [f.id for f in diagnose(base, target) if f.severity != "note"]
    linear_dtype: Any = "bf16" if variant == "bf16" else "base"
    splice(base, TINY / "upstream", out := base.parent / "out", variant, linear_dtype=linear_dtype)
    assert not errors(read_checkpoint(out)) and verify(out, base, TINY / "upstream")["ok"]
    written = read_object(out / "config.json", "a config")
    assert written["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "compression_config" not in written
    expect_format(base, "base")


def test_a_base_with_vllms_names_has_not_what_a_run_reads(base: Path) -> None:
    in_every_shard(as_vllm)(base)
    splice(base, TINY / "upstream", out := base.parent / "out", "mxfp4")
    edit_shard(out, as_vllm)
    assert not errors(read_checkpoint(out))
    given = (base, "base"), (TINY / "upstream", "head")
    found = [find_source(str(folder), None, part) for folder, part in given]
    with pytest.raises(GraftError, match=r"base: has no embed\.weight, which a run reads"):
        read_models(load_recipe(find_bundled_recipe()), *found)


@pytest.mark.parametrize(("blocks", "maker"), [(1, "an MTP head"), (3, "a DSpark drafter")])
def test_a_master_that_is_no_base_is_named(tmp_path: Path, blocks: int, maker: str) -> None:
    given = write(tmp_path / "given", ["DeepSeek's own FP8 and MXFP4"])
    write_index({f"mtp.{n}.norm.weight": "model.safetensors" for n in range(blocks)}, 0, given)
    for part in ("base", "served")[: blocks // 2 + 1]:  # vLLM serves one with an MTP head
        with pytest.raises(GraftError, match=rf"is DeepSeek's own .*, with {maker}; expected"):
            expect_format(given, part)
    expect_format(given, "head")


def with_zero_points(tensors: Tensors) -> Tensors:
    packed = {n.removesuffix("packed"): t for n, t in tensors.items() if n.endswith("_packed")}
    points = {n: torch.zeros(t.shape[0] // 8, t.shape[1] // 16).int() for n, t in packed.items()}
    return tensors | {f"{name}zero_point": tensor for name, tensor in points.items()}


def by_channel(tensors: Tensors) -> Tensors:
    is_scale = {n: f"{n.removesuffix('scale')}packed" in tensors for n in tensors}
    return {n: t[:, :1] if is_scale[n] else t for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "weights", "on_gpu", "on_cpu"),
    [
        (with_zero_points, {"symmetric": False}, set(), {"quantization-config"}),
        (with_zero_points, {}, {"scheme-mismatch"}, {"scheme-mismatch"}),
        (by_channel, {"strategy": None, "group_size": -1}, set(), {"quantization-config"}),
        (None, {"strategy": "channel", "group_size": None}, {"group-size"}, None),
        (None, {"num_bits": 3}, {"scheme-mismatch"}, None),
        (None, {"actorder": "group"}, {"quantization-config"}, None),
        (None, {"actorder": "static"}, set(), set()),
    ],
)
def test_errors_as_in_vllm(base: Path, change: Any, weights: Any, on_gpu: Any, on_cpu: Any) -> None:
    if change:
        in_every_shard(change)(base)
    defects.section(lambda q: q["config_groups"]["group_1"]["weights"].update(weights))(base)
    for target, expected in ((ON_GPU, on_gpu), (defects.ON_CPU, on_cpu)):
        found = {f.id for f in diagnose(base, target) if f.severity == "error"}
        assert expected is None or found == expected
    if weights.get("actorder") == "static" or not weights:
        return
    with pytest.raises(GraftError, match=r"experts are .*; expected int4|actorder|a channel"):
        splice(base, TINY / "upstream", base.parent / "rtn", "rtn")
    if not on_gpu:
        splice(base, TINY / "upstream", base.parent / "mxfp4", "mxfp4")
        assert not [f.id for f in diagnose(base.parent / "mxfp4", ON_GPU) if f.severity == "error"]


def test_endless_patterns_are_an_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = QuantizationConfig.__private_attributes__["_seconds"]
    monkeypatch.setattr(seconds, "default", 0.5)
    defects.ignore("re:(.*){1,30}[A-Z]")(base)
    start = time.process_time()
    (found,) = (f for f in diagnose(base, ON_GPU) if f.severity == "error")
    assert "takes more than" in found.found and time.process_time() - start < 5
    with pytest.raises(GraftError, match="takes more than"):
        splice(base, TINY / "upstream", base.parent / "rtn", "rtn")


@pytest.mark.parametrize("kind", ["fp8", "plain"])
def test_serve_shares_experts_of_other_kinds_too(tiny_base: Path, kind: str) -> None:
    def edit(section: Any) -> None:
        groups = section["config_groups"]
        targets = groups.pop("group_1")["targets"]
        groups["group_0"]["targets"] += targets if kind == "fp8" else []

    checkpoint = defects.changed(tiny_base, {r".*\.experts\..*": kind}, edit)
    assert not errors(checkpoint)
    expected = {} if kind == "plain" else {"moe_intermediate_size": 128}
    uneven = undivided(checkpoint.config, 4)
    assert {k: v for k, v in uneven.items() if k.startswith("moe")} == expected
