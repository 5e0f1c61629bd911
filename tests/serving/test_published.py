"""The published checkpoints as sparse files: what they are, and all that is done with them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_graft.checkpoint.shards import Shard
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.names import FLOAT32, NEVER_QUANTIZED
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.errors import GraftError
from mtp_graft.pipeline import STAGES
from mtp_graft.pipeline.plan import plan_run
from mtp_graft.recipe import Variant, load_recipe
from mtp_graft.serving.doctor import diagnose, examine
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.doctor.fix import fix_checkpoint
from mtp_graft.serving.doctor.hardware import find_target
from mtp_graft.stages.splice import HEAD_SHARD, open_base, plan_splice, splice
from mtp_graft.stages.verify import verify

from . import flash
from .flash import BASE, CONFIG, PREVIEW, Published, Tensors, meta, published

ALL, SOME, FEW = 256, 16, 2  # experts
ON_H200S = ("--gpu", "H200", "--count", "2")
NOTES = {"float32-rounded", "compressor-fp8", "memory", "piecewise-graphs"}
MTP, DSPARK = "with an MTP head", "with a DSpark drafter"
#: Calls commands in an address space smaller than any shard of the base, with some experts or all.
LIMITED = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**31,) * 2)
from mtp_graft import cli
for number, words in enumerate(json.loads(sys.argv[1])):
    sys.argv = ["mtp-graft", *words, "--json", f"{number}.json"]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, words
"""
Folders = Callable[[str, int], Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    top = tmp_path_factory.mktemp("published")

    def write(name: str, experts: int) -> Path:
        if not (folder := top / f"{name}-{experts}").exists():
            found = published(name)
            (found if experts == ALL else found.with_experts(experts)).write(folder)
        return folder

    return write


def ids(found: list[Any]) -> set[str]:
    return {finding.id for finding in found}


def test_stand_ins_have_the_published_sizes_and_numbers(folders: Folders) -> None:
    for shard in json.loads((flash.shared(PREVIEW) / "shards.json").read_text())["shards"]:
        size = (folders(PREVIEW, ALL) / shard["file"]).stat().st_size
        assert 0 <= size - shard["bytes"] <= 32, "we write metadata"
    base = published(BASE)
    shards = [path.stat().st_size for path in folders(BASE, ALL).glob("*.safetensors")]
    assert len(shards) == 4 and all(37e9 < size < 39e9 for size in shards)
    assert len(base.tensors) == 100_652
    assert sum(name.endswith(".weight_scale") for name in base.tensors) == 33_405
    like, preview = flash.like_preview(published(PREVIEW).config), flash.listed(PREVIEW)
    assert like.keys() == preview.keys(), "what makes the Pro's list makes the preview's"
    assert all((t.dtype, t.shape) == (like[n].dtype, like[n].shape) for n, t in preview.items())


MASTERS = {PREVIEW: MTP, "deepseek-v4-pro": MTP}
MASTERS |= dict.fromkeys(("deepseek-v4-flash-0731", "deepseek-v4-flash-dspark"), DSPARK)


@pytest.mark.parametrize(("name", "what"), MASTERS.items())
def test_a_master_is_no_base(folders: Folders, tmp_path: Path, name: str, what: str) -> None:
    master = folders(name, FEW)
    (finding,) = diagnose(master, find_target(gpu="H200", count=2))
    assert (finding.id, finding.fixable) == ("foreign-format", False)
    assert finding.found == f"DeepSeek's own FP8 and MXFP4, {what}"
    with pytest.raises(GraftError, match=rf"{name}-{FEW}: is DeepSeek's own .*, {what}; expec"):
        splice(master, folders(PREVIEW, FEW), tmp_path / "out")
    if what == DSPARK:  # by the headers alone: copies of its weights cost seconds
        plan = plan_splice(base := open_base(folders(BASE, FEW)), master, None)
        index = {**base.index, **dict.fromkeys(plan.layout, HEAD_SHARD)}
        shards = {**base.shards, HEAD_SHARD: plan.layout}
        made = Checkpoint(base.folder, plan.config, index, shards, {})
        found = ids(examine(made, find_target(gpu="H200", count=2)))
        assert found <= NOTES | {"index-total-size"}, "the index is still the base's own"


@pytest.mark.parametrize("name", ["deepseek-v4-flash-0731", "deepseek-v4-flash-dspark"])
def test_published_dspark_drafters_have_the_tensors_that_their_config_asks_for(name: str) -> None:
    drafter = names.find_drafter(listed := flash.listed(name), name)
    assert drafter[:2] == ("dspark", 3)
    decoded = decode_head({each: listed[each] for each in drafter.names})
    found = {each: tuple(tensor.shape) for each, tensor in decoded.items()}
    assert len(found) == 2376 and found == names.head_shapes(published(name).config)
    plain = [each for each in drafter.names if listed[each].dtype.itemsize > 1]
    assert all(listed[each].dtype == names.storage_dtype(each) for each in plain)


@pytest.mark.slow
def test_shards_may_exceed_memory(folders: Folders, tmp_path: Path, repo_root: Path) -> None:
    base, preview, out = folders(BASE, SOME), folders(PREVIEW, SOME), tmp_path / "grafted"
    assert all(shard.stat().st_size > 2**31 for shard in base.glob("*.safetensors"))
    models = [f'--set=model.{n}="{p}"' for n, p in (("base", base), ("upstream", preview))]
    served = '--set=bench.served_variants=["gptq", "mxfp4", "bf16"]'
    calls = [
        ("doctor", base, *ON_H200S),
        ("serve", base, "--dry-run", *ON_H200S),
        ("run", repo_root / "recipes" / "dsv4-flash.toml", "--dry-run", *models, served),
        ("graft", folders(BASE, FEW), folders(PREVIEW, FEW), out),
        ("doctor", out, *ON_H200S),
    ]
    words = json.dumps([list(map(str, call)) for call in calls])
    limited = [sys.executable, "-c", LIMITED, words]
    ended = subprocess.run(limited, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    said = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(len(calls))]
    before, after = ({f["id"] for f in said[n]["findings"]} for n in (0, 4))
    assert (before, after) == (NOTES | {"head-absent"}, NOTES)
    assert str(base) in str(said[1]) and (said[2]["inputs"], said[3]["verified"]) == ("fit", True)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bf16", "rtn"])
def test_the_previews_head_verifies(folders: Folders, tmp_path: Path, variant: Variant) -> None:
    base, preview, out = folders(BASE, FEW), folders(PREVIEW, FEW), tmp_path / variant
    splice(base, preview, out, variant)
    found = verify(out, base, preview)
    assert found["ok"] and found["base_files_linked"] and found["rel_error_max"] == 0
    assert ids(diagnose(out, find_target(gpu="H200", count=2))) == NOTES


def test_headers_once(folders: Folders, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, preview, opened = folders(BASE, FEW), folders(PREVIEW, FEW), list[Path]()
    really = Shard.__init__

    def counting(shard: Shard, path: Path) -> None:
        opened.append(path.resolve())
        really(shard, path)

    monkeypatch.setattr(Shard, "__init__", counting)
    models = [f'model.{n}="{p}"' for n, p in (("base", base), ("upstream", preview))]
    served = 'bench.served_variants=["gptq", "mxfp4", "bf16"]'
    recipe = load_recipe(repo_root / "recipes" / "dsv4-flash.toml", [*models, served])
    assert plan_run(recipe, Path("run"), STAGES)["inputs"] == "fit"
    assert sorted(p for p in opened if p.parent == base) == sorted(base.glob("*.safetensors"))


def canada(ignored: str = r"re:.*mtp\..*") -> Published:
    """canada-quant's W4A16-FP8-MTP: compressors decoded, 417 in float32, a BF16 head."""
    tensors: Tensors = {}
    for name, tensor in published(BASE).tensors.items():
        module, _, part = name.rpartition(".")
        right = name.replace("e_score_correction_bias", "bias")
        is_plain = NEVER_QUANTIZED.search(module) or module.endswith(".indexer.wq_b")
        decoded = tensor.to(torch.bfloat16) if is_plain and part == "weight" else tensor
        if not (is_plain and part == "weight_scale"):
            is_float = FLOAT32.search(right) or name == "head.weight"
            tensors[right] = decoded.float() if is_float else decoded
    for name, shape in names.head_shapes(CONFIG).items():
        tensors[name] = meta(torch.float32 if FLOAT32.search(name) else torch.bfloat16, *shape)
    copies = {"head.weight": tensors["head.weight"], "emb.tok_emb.weight": tensors["embed.weight"]}
    tensors |= {f"mtp.0.{name}": tensor for name, tensor in copies.items()}
    plain = [n.removesuffix(".weight") for n in tensors if NEVER_QUANTIZED.search(n)]
    section = deepcopy(CONFIG["quantization_config"]) | {"scale_fmt": "ue8m0"}
    section["ignore"] += [*plain, ignored]
    section["config_groups"]["group_0"]["targets"] = [r"re:.*attn\.(wq_a|wq_b|wkv|wo_a|wo_b)$"]
    return Published({**CONFIG, "quantization_config": section}, {"model.safetensors": tensors})


def nvfp4() -> Published:
    """The same with experts in compressed-tensors' NVFP4, as far as its format is known."""
    found = canada()
    section = deepcopy(found.config["quantization_config"])
    experts = section["config_groups"]["group_1"]["weights"]
    experts |= {"type": "float", "strategy": "tensor_group", "group_size": 16, "actorder": None}
    tensors = {n: t for n, t in found.tensors.items() if ".experts." not in n or "mtp." in n}
    for name, tensor in found.tensors.items():
        if name.endswith(".weight_packed"):
            (outputs, words), module = tensor.shape, name.removesuffix("weight_packed")
            tensors[name] = meta(torch.uint8, outputs, 4 * words)
            tensors[f"{module}weight_scale"] = meta(torch.float8_e4m3fn, outputs, words // 2)
            scales = ("weight_global_scale", "input_global_scale")
            tensors |= {f"{module}{scale}": meta(torch.float32) for scale in scales}
    config = {**found.config, "quantization_config": section}
    return Published(config, {"model.safetensors": tensors})


def test_what_others_made_of_the_base_is_judged_by_what_it_is() -> None:
    found = canada()
    assert len(found.tensors) == 101_285
    assert sum(name.endswith(".weight_scale") for name in found.tensors) == 33_239
    on_gpu, on_cpu = (
        [f for f in examine(found.with_experts(FEW).read(), target) if f.severity == "error"]
        for target in (find_target(gpu="H200", count=2), find_target(gpu="cpu", count=1))
    )
    assert ids(on_gpu) == {"pattern-names-mtp"}, "the copies of embedding and LM head are read"
    assert {"pattern-names-mtp", "head-tensor-unknown"} <= ids(on_cpu)
    (foreign,) = examine(nvfp4().with_experts(FEW).read(), find_target(gpu="H200", count=2))
    assert (foreign.id, foreign.found) == ("foreign-format", "compressed-tensors' NVFP4")


def ignore_by_pattern(section: dict[str, Any]) -> None:
    section["ignore"] = ["lm_head", r"re:.*shared_experts.*"]


def null_formats(section: dict[str, Any]) -> None:
    section["format"] = "pack-quantized"
    section["config_groups"]["group_1"] |= {"format": None, "input_activations": None}


def canada_any_mtp() -> Published:
    return canada("re:.*mtp.*")


@pytest.mark.parametrize("make", [lambda: published(BASE), flash.with_head, canada, canada_any_mtp])
def test_a_fixed_published_copy_is_sound(make: Callable[[], Published], tmp_path: Path) -> None:
    found, target = make().with_experts(FEW), find_target(gpu="H200", count=2)
    section = deepcopy(found.config["quantization_config"])
    section |= {"ignore": section["ignore"] if make in (canada, canada_any_mtp) else None}
    config = {**found.config, "num_nextn_predict_layers": 0, "quantization_config": section}
    wrong = {
        shard: {re.sub(r"^(mtp.*)weight_scale$", r"\1scale", name): t for name, t in held.items()}
        for shard, held in found.shards.items()
    }
    given, out, asked = Published(config, wrong).write(tmp_path / "given"), tmp_path / "out", [""]
    assert fix_checkpoint(given, out, diagnose(given, target), target, asked.append)
    assert not [f for f in diagnose(out, target) if f.severity == "error"]
    assert (len(asked) == 2) is (make is flash.with_head), "a shard is copied for its names alone"


@pytest.mark.parametrize("change", [lambda _: None, ignore_by_pattern, null_formats])
def test_sections_as_others_write_them_have_notes_alone(change: Callable[[Any], None]) -> None:
    found = flash.with_head().with_experts(FEW)
    change(section := deepcopy(found.config["quantization_config"]))
    found.config["quantization_config"] = section
    assert ids(examine(found.read(), find_target(gpu="H200", count=2))) == NOTES
