"""Doctor: nothing on good checkpoints, each planted defect by its id alone, and what --fix does."""

import json
import os
import re
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from typer.testing import CliRunner

from mtp_graft.checkpoint.shards import load_tensors, read_meta
from mtp_graft.cli.app import app
from mtp_graft.errors import GraftError
from mtp_graft.serving import command
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.doctor import diagnose, examine, fix
from mtp_graft.serving.doctor.findings import KINDS, Finding
from mtp_graft.serving.doctor.hardware import Target, find_target
from mtp_graft.serving.plan import make_plan
from mtp_graft.serving.topology import named_gpus
from mtp_graft.stages.splice import splice
from quantized import write_quantized
from serving.conftest import install_gpus
from serving.doctor_defects import DEFECTS, HEAD, INDEX, edit_config, edit_quantization, edit_shard
from serving.flash import flash

VARIANTS = ("rtn", "gptq", "mxfp4", "bf16")
ON_CPU = Target(Version("0.32.0"), "cpu", find_target(gpu="cpu").hardware)
ON_H200 = find_target(gpu="H200")
Plant = Callable[[str], Path]


def ids(findings: list[Finding], *severities: str) -> list[str]:
    return [f.id for f in findings if not severities or f.severity in severities]


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every variant's checkpoint on one file system with its base, and the base as `base`."""
    folder = tmp_path_factory.mktemp("good")
    base = shutil.copytree(tiny_model / "base", folder / "base")
    quantized = write_quantized(folder / "quantize", load_tensors(tiny_model / "upstream"))
    for variant in VARIANTS:
        given = quantized if variant == "gptq" else None
        splice(base, tiny_model / "upstream", folder / variant, variant, quantized=given)
    return {name: folder / name for name in ("base", *VARIANTS)}


@pytest.fixture
def copy(good: dict[str, Path], tmp_path: Path) -> Plant:
    """Copy a good checkpoint; its shards are links, which defects replace and never write to."""

    def link_shards(source: str, target: str) -> None:
        (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)

    return lambda name: shutil.copytree(good[name], tmp_path / name, copy_function=link_shards)


@pytest.fixture
def planted(copy: Plant) -> Plant:
    def plant(name: str) -> Path:
        folder = copy("rtn")
        DEFECTS[name][1](folder)
        return folder

    return plant


# Good checkpoints, and the published ones


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gpu", ["cpu", "H200", "RTX PRO 6000 Server"])
def test_a_good_checkpoint_has_no_errors_or_warnings(
    good: dict[str, Path], variant: str, gpu: str
) -> None:
    assert ids(diagnose(good[variant], find_target(gpu=gpu)), "error", "warning") == []


def test_without_vllm_doctor_says_what_it_left_out(
    good: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(command, "distribution", absent)
    install_gpus(monkeypatch, error="Driver Not Loaded")
    where = find_target()
    assert (where.vllm, where.platform, where.hardware) == (None, None, None)
    assert ids(diagnose(good["rtn"], where)) == ["vllm-unknown"]


def test_the_published_base_has_notes_alone_and_nothing_to_fix() -> None:
    found = examine(flash(), find_target(gpu="H200", count=2))
    notes = {f.id: f.found for f in found}
    assert ids(found, "error", "warning") == [] and not any(f.fixable for f in found)
    assert "(108 in all)" in notes["float32-rounded"] and "(145 in all)" in notes["compressor-fp8"]


def as_deepseek(folder: Path) -> None:
    edit_config(folder, lambda c: c.update(quantization_config={"quant_method": "fp8"}))
    for shard in sorted(folder.glob("*.safetensors")):

        def to_scale(tensors: dict[str, Any]) -> None:
            for name in [name for name in tensors if name.endswith(".weight_scale")]:
                scale = tensors.pop(name).float().to(torch.float8_e8m0fnu)
                tensors[name.replace("weight_scale", "scale")] = scale

        edit_shard(folder, to_scale, shard.name)


def as_modelopt(folder: Path) -> None:
    as_deepseek(folder)
    (folder / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')


def as_mlx(folder: Path) -> None:
    edit_config(folder, lambda c: c.update(quantization={"bits": 4}))
    edit_config(folder, lambda c: c.pop("quantization_config"))


def as_gptq(folder: Path) -> None:
    edit_quantization(folder, lambda q: q.update(quant_method="gptq"))


@pytest.mark.parametrize(
    ("make", "maker"),
    [(as_deepseek, "DeepSeek's"), (as_modelopt, "ModelOpt"), (as_mlx, "MLX"), (as_gptq, "gptq")],
)
def test_another_format_is_named_and_left_alone(
    copy: Plant, make: Callable[[Path], None], maker: str, tmp_path: Path
) -> None:
    folder = copy("rtn")
    make(folder)
    (finding,) = diagnose(folder, ON_CPU)
    assert finding.id == "foreign-format" and maker in finding.found
    assert run(folder, "--gpu", "cpu", "--fix", tmp_path / "fixed")[0] == 0
    assert not (tmp_path / "fixed").exists()


# Planted defects


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found_by_its_id_and_no_other(planted: Plant, name: str) -> None:
    folder, expected = planted(name), [DEFECTS[name][0]]
    found = diagnose(folder, ON_CPU)
    assert ids(found) == expected
    on_gpu = ids(diagnose(folder, ON_H200))
    notes = ("memory", "piecewise-graphs")  # of every checkpoint
    assert [id_ for id_ in on_gpu if id_ not in notes] == expected
    assert all((f.where, f.found, f.expected, f.why, f.cure) for f in found)


def test_findings_that_claim_a_run_have_one(repo_root: Path) -> None:
    page = (repo_root / "docs" / "doctor.md").read_text()
    results = repo_root / "benchmarks" / "results" / "doctor_defects_cpu.json"
    runs = json.loads(results.read_text())["results"]
    rows = re.findall(r"^\| `([\w-]+)` \| `([\w-]+)` \| (strict|lenient) \|", page, re.MULTILINE)
    assert {f"{loading}: {defect}" for defect, _, loading in rows} <= runs.keys()
    assert all(DEFECTS[defect][0] == kind for defect, kind, _ in rows)
    assert {kind for _, kind, _ in rows} == {k for k, v in KINDS.items() if v.evidence == "run"}


def test_every_kind_of_finding_is_made_somewhere(repo_root: Path) -> None:
    package = repo_root / "src" / "mtp_graft" / "serving" / "doctor"
    code = "\n".join(path.read_text() for path in package.glob("*.py"))
    code += " ".join(
        f"{place}-tensor-{what}" for place in ("base", "head") for what in ("missing", "unknown")
    )
    assert [kind for kind in KINDS if kind not in code] == []


def test_two_defects_are_two_findings_errors_first(planted: Plant) -> None:
    folder = planted("scale-inv")
    DEFECTS["head-count-0"][1](folder)
    DEFECTS["rounded-float32"][1](folder)
    assert ids(diagnose(folder, ON_CPU)) == ["scale-name", "nextn-count", "float32-rounded"]


def test_a_finding_says_where_what_and_what_was_expected(planted: Plant) -> None:
    (finding,) = diagnose(planted("wrong-group"), ON_CPU)
    assert finding.where == "mtp.0.ffn.experts.3.w2.weight_scale"
    assert finding.found.startswith("[256, 4]") and finding.expected.startswith("[256, 2]")


FUSED = r"re:.*\.attn\.(fused_wqa_wkv|compressor\.fused_wkv_wgate|wq_b|wo_a|wo_b)$"


@pytest.mark.parametrize(
    ("group", "targets", "expected"),
    [
        ("group_0", [FUSED, r"re:.*\.indexer\.wq_b$"], []),
        ("group_0", ["Linear"], ["scheme-mismatch"]),
        ("mtp_projections", ["layers.4.e_proj", "model.layers.4.h_proj"], []),
        ("mtp_projections", [r"re:.*\.(e_proj|h_proj)$"], []),
        ("mtp_projections", ["layers.4.e_proj"], ["scheme-mismatch"]),
    ],
)
def test_targets_are_matched_as_vllm_does(
    copy: Plant, group: str, targets: list[str], expected: list[str]
) -> None:
    folder = copy("rtn")
    edit_quantization(folder, lambda q: q["config_groups"][group].update(targets=targets))
    assert ids(diagnose(folder, ON_CPU)) == expected


def test_names_of_experts_matter_by_platform(planted: Plant) -> None:
    folder = planted("one-family-of-names")
    levels = {
        where.platform: [f.severity for f in diagnose(folder, where) if f.severity != "note"]
        for where in (ON_CPU, ON_H200)
    }
    assert levels == {"cpu": ["error"], "cuda": ["warning"]}


def test_copies_of_embedding_and_lm_head_are_known_on_gpus(copy: Plant) -> None:
    folder = copy("rtn")
    names = ("mtp.0.head.weight", "mtp.0.emb.tok_emb.weight")
    edit_shard(folder, lambda t: t.update({name: torch.zeros(4, 4) for name in names}))
    assert ids(diagnose(folder, ON_H200), "error") == []
    assert ids(diagnose(folder, ON_CPU), "error") == ["head-tensor-unknown"]


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize("text", [None, "{\n  'a': 1\n}", "[]", "[" * 100_000, '{"weight_map": 1}'])
def test_a_config_or_index_that_cannot_be_used_is_the_one_finding(
    copy: Plant, file: str, text: str | None
) -> None:
    folder = copy("rtn")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    status, result = run(folder, "--gpu", "cpu")
    (finding,) = result["findings"]
    kind = "config-unusable" if file == "config.json" else "index-unusable"
    assert (status, result["ok"], finding["id"], finding["where"]) == (1, False, kind, file)
    assert str(folder) not in finding["found"]


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("model_type", "llama", "model_type is 'llama'"),
        ("hidden_size", None, "hidden_size is None"),
        ("o_groups", 0, "o_groups is 0"),
        ("n_routed_experts", 10**9, "n_routed_experts is 1000000000"),
        ("sliding_window", "wide", "sliding_window is 'wide'"),
        ("hc_mult", True, "hc_mult is True"),
        ("num_nextn_predict_layers", 1.5, "num_nextn_predict_layers is 1.5"),
    ],
)
def test_a_bad_dimension_is_the_one_finding_of_doctor_and_an_error_of_serve(
    copy: Plant, name: str, value: Any, found: str
) -> None:
    folder = copy("rtn")
    edit_config(folder, lambda config: config.update({name: value}))
    (finding,) = diagnose(folder, ON_H200)
    assert finding.id == "config-unusable" and found in finding.found
    with pytest.raises(GraftError, match=re.escape(found)):
        make_plan(ServeOptions(folder), "auto", named_gpus("H200", 2))


@pytest.mark.parametrize("value", [None, {}, [0, "a", 4, 128, 0], [0, 0, 4, -1, 0]])
def test_ratios_that_are_none_are_an_error(copy: Plant, value: Any) -> None:
    folder = copy("rtn")
    edit_config(folder, lambda config: config.update(compress_ratios=value))
    found = [f for f in diagnose(folder, ON_CPU) if f.id == "compress-ratios"]
    assert [(f.severity, f.found, f.fixable) for f in found] == [("error", repr(value), False)]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("ignore", [1]), ("ignore", {"lm_head": 1}), ("targets", [None]), ("weights", "int4")),
        *(("ignore", ["re:*shared_experts*"]), ("weights", {"group_size": 0})),
    ],
)
def test_a_section_that_vllm_cannot_read_is_a_finding(copy: Plant, place: str, value: Any) -> None:
    def damage(section: dict[str, Any]) -> None:
        group = next(iter(section["config_groups"].values()))
        (section if place == "ignore" else group)[place] = value

    folder = copy("rtn")
    edit_quantization(folder, damage)
    (finding,) = diagnose(folder, ON_CPU)
    assert finding.id == "quantization-config" and place in finding.found


# --fix and the command


def run(*arguments: object) -> tuple[int, Any]:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json", "-"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout) if result.stdout else None


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


FIXABLE = (
    *("shard-not-in-index", "tensor-not-in-index", "gate-up-down-names", "head-named-as-layer"),
    *("scale-inv", "scale-of-linears", "no-head-count", "head-compressed", "no-ratio-for-head"),
    *("target-for-mtp", "ignore-for-mtp", "ignore-is-null", "one-family-of-names"),
    "wrong-group-size-in-config",
)


@pytest.mark.parametrize("name", FIXABLE)
def test_fix_writes_a_copy_without_the_defect(
    planted: Plant, good: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder, out = planted(name), tmp_path / "fixed"
    before = snapshot(folder)
    status, result = run(folder, "--gpu", "cpu", "--fix", out)
    assert (status, result["fixed"], result["remaining"]) == (0, str(out), [])
    assert snapshot(folder) == before
    read_meta(out, complete=True)
    expected, found = load_tensors(good["rtn"]), load_tensors(out)
    assert expected.keys() == found.keys()
    assert all(expected[n].view(-1).equal(found[n].view(-1)) for n in list(expected)[::97])
    base_shard = "model-00001-of-00003.safetensors"
    assert os.path.samefile(out / base_shard, folder / base_shard)
    assert run(out, "--gpu", "cpu", "--fix", tmp_path / "again")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fixed", "rtn"]


def test_what_fix_does_not_cure_does_not_promise_it(planted: Plant) -> None:
    cured = {DEFECTS[name][0] for name in FIXABLE}
    assert cured == {kind for kind, each in KINDS.items() if each.cure.startswith("--fix")}


def test_fix_says_how_much_it_copies_refuses_what_it_cannot_and_leaves_nothing(
    planted: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, said = planted("scale-inv"), tmp_path / "fixed", list[str]()
    found = diagnose(folder, ON_CPU)
    with pytest.raises(GraftError, match="already exists"):
        fix.fix_checkpoint(folder, folder, found, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(fix, "write_index", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fix.fix_checkpoint(folder, out, found, said.append)
    size = (folder / HEAD).stat().st_size
    assert f"copies {size:,} bytes" in said[-1]
    DEFECTS["truncated-shard"][1](folder)
    with pytest.raises(GraftError, match=f"{HEAD}: .*--fix corrects config and names only"):
        fix.fix_checkpoint(folder, out, found, said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rtn"]


def test_the_command_tells_by_its_status_whether_anything_is_an_error(
    good: dict[str, Path], planted: Plant
) -> None:
    status, result = run(good["rtn"], "--gpu", "H200")
    assert (status, result["ok"], result["tp"], result["fixed"]) == (0, True, 1, None)
    assert run(good["rtn"], "--gpu", "RTX PRO 6000 Max-Q", "--count", 2)[0] == 0
    status, result = run(planted("scale-inv"), "--gpu", "cpu")
    assert (status, result["ok"]) == (1, False)
    keys = {"id", "severity", "where", "found", "expected", "why", "cure", "fixable", "evidence"}
    assert [finding.keys() for finding in result["findings"]] == [keys]


def test_wrong_usage(good: dict[str, Path], tmp_path: Path) -> None:
    assert run(good["rtn"], "--count", "2")[0] == 2
    with pytest.raises(GraftError, match="expected one"):
        run(good["rtn"], "--gpu", "H300")
    with pytest.raises(GraftError, match="gone: not a folder"):
        run(tmp_path / "gone", "--gpu", "cpu")
