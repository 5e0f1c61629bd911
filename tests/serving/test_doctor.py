"""Doctor: nothing on good checkpoints, and each planted defect by its id and nothing else."""

import json
import os
import re
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from mtp_graft.serving.doctor.known_issues import ISSUES
from mtp_graft.serving.doctor.survey import canonical_name, read_survey
from packaging.version import Version
from typer.testing import CliRunner

from mtp_graft.checkpoint.shards import check_index, load_tensors
from mtp_graft.cli.app import app
from mtp_graft.dsv4.config import DIMENSIONS
from mtp_graft.errors import GraftError
from mtp_graft.serving import command
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.doctor import diagnose, target
from mtp_graft.serving.doctor.findings import Finding
from mtp_graft.serving.doctor.fix import write_corrected
from mtp_graft.serving.doctor.target import Target, find_target
from mtp_graft.serving.plan import make_plan
from mtp_graft.serving.topology import named_gpus
from mtp_graft.stages.splice import splice
from quantized import write_quantized
from serving.doctor_defects import DEFECTS, HEAD, edit_config, edit_shard, retarget

VARIANTS = ("rtn", "gptq", "mxfp4", "bf16")
ON_CPU = Target(Version("0.32.0"), "cpu", find_target(gpu="cpu").hardware)
NO_VLLM_OR_GPU = Target(None, None, None)


def on(gpu: str, count: int = 1, **more: Any) -> Target:
    return find_target(gpu=gpu, count=count, **more)


def ids(findings: list[Finding], *severities: str) -> list[str]:
    return [f.id for f in findings if not severities or f.severity in severities]


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every variant's checkpoint on one file system with its base, and the base as `base`."""
    folder = tmp_path_factory.mktemp("good")
    base = shutil.copytree(tiny_model / "base", folder / "base")
    upstream = load_tensors(tiny_model / "upstream")
    quantized = write_quantized(folder / "quantize", upstream)
    for variant in VARIANTS:
        given = quantized if variant == "gptq" else None
        splice(base, tiny_model / "upstream", folder / variant, variant, quantized=given)
    return {name: folder / name for name in ("base", *VARIANTS)}


@pytest.fixture
def copy(good: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a good checkpoint; its shards are links, which defects replace and never write to."""

    def link_shards(source: str, target: str) -> None:
        (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)

    return lambda name: shutil.copytree(good[name], tmp_path / name, copy_function=link_shards)


@pytest.fixture
def planted(copy: Callable[[str], Path]) -> Callable[[str], Path]:
    def plant(name: str) -> Path:
        folder = copy("rtn")
        DEFECTS[name][1](folder)
        return folder

    return plant


# Good checkpoints


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "where",
    [
        ON_CPU,
        on("H200"),
        on("H100", 2),
        on("RTX PRO 6000 Server"),
        NO_VLLM_OR_GPU,
    ],
    ids=["cpu", "h200", "h100x2", "pro6000", "unknown"],
)
def test_a_good_checkpoint_has_no_errors_or_warnings(
    good: dict[str, Path], variant: str, where: Target
) -> None:
    assert ids(diagnose(good[variant], where), "error", "warning") == []


def test_a_base_without_head_is_a_note(good: dict[str, Path]) -> None:
    (finding,) = diagnose(good["base"], ON_CPU)
    assert (finding.id, finding.severity) == ("head-absent", "note")


def test_without_vllm_doctor_says_what_it_left_out(
    good: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(command, "distribution", absent)
    monkeypatch.setattr(target.shutil, "which", lambda _name: None)
    where = find_target()
    assert (where.vllm, where.platform, where.hardware) == (None, None, None)
    assert ids(diagnose(good["rtn"], where)) == ["vllm-unknown"]


# Planted defects


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found_by_its_id_and_no_other(
    planted: Callable[[str], Path], name: str
) -> None:
    folder, expected = planted(name), [DEFECTS[name][0]]
    found = diagnose(folder, ON_CPU)
    assert ids(found) == expected
    on_gpu = ids(diagnose(folder, on("H200")))
    notes = ("memory", "piecewise-graphs")  # of every checkpoint
    assert [id_ for id_ in on_gpu if id_ not in notes] == expected
    assert all((f.where, f.found, f.expected, f.why, f.cure) for f in found)


def test_at_least_fifteen_kinds_of_defect_are_planted_and_described(repo_root: Path) -> None:
    kinds = {kind for kind, _plant in DEFECTS.values()}
    assert len(kinds) >= 15
    described = (repo_root / "docs" / "doctor.md").read_text()
    assert [name for name in DEFECTS if f"`{name}`" not in described] == []
    assert [kind for kind in kinds if f"`{kind}`" not in described] == []
    assert [issue.id for issue in ISSUES if f"`{issue.id}`" not in described] == []


def test_what_the_docs_call_seen_is_in_the_result_file(repo_root: Path) -> None:
    results = repo_root / "benchmarks" / "results" / "doctor_defects_cpu.json"
    runs = json.loads(results.read_text())["results"]
    page = (repo_root / "docs" / "doctor.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` .*\| (seen[^|]*) \|$", page, re.MULTILINE)
    modes = {"seen": "strict", "seen, lenient": "lenient"}
    claimed = {f"{modes[how]}: {defect}" for defect, hows in rows for how in hows.split("; ")}
    assert len(claimed) > 10
    assert claimed <= runs.keys()


def test_every_finding_that_the_code_can_make_is_described(repo_root: Path) -> None:
    package = repo_root / "src" / "mtp_graft" / "serving" / "doctor"
    text = "\n".join(path.read_text() for path in sorted(package.glob("*.py")))
    made = set(re.findall(r'Finding\(\s*"([a-z0-9-]+)"', text))
    described = (repo_root / "docs" / "doctor.md").read_text()
    assert len(made) > 20
    assert sorted(kind for kind in made if f"`{kind}`" not in described) == []


def test_two_defects_are_two_findings(planted: Callable[[str], Path]) -> None:
    folder = planted("scale-inv")
    DEFECTS["head-count-0"][1](folder)
    DEFECTS["misspelled-ignore"][1](folder)
    found = diagnose(folder, ON_CPU)
    assert sorted(ids(found, "error")) == ["nextn-count", "scale-name"]
    assert ids(found)[-1] == "pattern-matches-nothing", "errors come first"


def test_a_finding_says_where_what_and_what_was_expected(planted: Callable[[str], Path]) -> None:
    (finding,) = diagnose(planted("wrong-group"), ON_CPU)
    assert finding.where == "mtp.0.ffn.experts.3.w2.weight_scale"
    assert finding.found.startswith("[256, 4]") and finding.expected.startswith("[256, 2]")


def test_bf16_projections_need_an_entry_of_their_own(copy: Callable[[str], Path]) -> None:
    folder = copy("rtn")

    def decode(tensors: dict[str, Any]) -> None:
        for name in ("e_proj", "h_proj"):
            weight = tensors[f"mtp.0.{name}.weight"]
            tensors[f"mtp.0.{name}.weight"] = weight.bfloat16()
            del tensors[f"mtp.0.{name}.weight_scale"]

    edit_shard(folder, decode)
    assert ids(diagnose(folder, ON_CPU)) == ["scheme-mismatch"]

    def without_group(config: dict[str, Any]) -> None:
        del config["quantization_config"]["config_groups"]["mtp_projections"]

    edit_config(folder, without_group)
    assert ids(diagnose(folder, ON_CPU)) == []


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["layers.4.e_proj", "model.layers.4.h_proj"], []),
        ([r"re:.*\.(e_proj|h_proj)$"], []),
        (["re:.*shared_experts.w2$", "layers.4.e_proj", "layers.4.h_proj"], []),
        (["layers.4.e_proj"], ["scheme-mismatch"]),
        (
            ["layers.4.e_proj", "layers.4.h_proj", "layers.0.ffn.shared_experts.w2"],
            ["scheme-mismatch"],
        ),
    ],
)
def test_full_names_are_mapped_as_vllm_does(
    copy: Callable[[str], Path], targets: list[str], expected: list[str]
) -> None:
    folder = copy("rtn")
    retarget("mtp_projections", targets)(folder)
    assert ids(diagnose(folder, ON_CPU)) == expected


def test_names_of_experts_matter_by_platform(planted: Callable[[str], Path]) -> None:
    folder = planted("one-family-of-names")
    severity = {
        where.platform: [
            f.severity for f in diagnose(folder, where) if f.id == "expert-target-names"
        ]
        for where in (ON_CPU, on("H200"))
    }
    assert severity == {"cpu": ["error"], "cuda": ["warning"]}


@pytest.mark.parametrize(
    ("spelled", "read"),
    [
        ("layers.43.e_proj.weight", "mtp.0.e_proj.weight"),
        ("model.layers.43.shared_head.norm.weight", "mtp.0.norm.weight"),
        ("mtp.0.mtp_block.attn.wkv.weight_scale_inv", "mtp.0.attn.wkv.weight_scale"),
        ("layers.1.mlp.experts.7.up_proj.weight", "layers.1.ffn.experts.7.w3.weight"),
        ("mtp.0.attn.wq_a.scale", "mtp.0.attn.wq_a.weight_scale"),
        ("mtp.0.hc_attn_scale", "mtp.0.hc_attn_scale"),
        ("layers.42.ffn.gate.bias", "layers.42.ffn.gate.bias"),
    ],
)
def test_known_spellings_lead_to_the_name_that_is_read(spelled: str, read: str) -> None:
    assert canonical_name(spelled, 43) == read


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "not found"),
        ("{\n  'a': 1\n}", "at line 2, column 3)"),
        ("[]", "(JSON, but no object)"),
    ],
)
def test_a_config_or_index_that_cannot_be_used_is_the_one_finding(
    copy: Callable[[str], Path], file: str, text: str | None, found: str
) -> None:
    folder = copy("rtn")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    (finding,) = diagnose(folder, ON_CPU)
    kind = "config-unusable" if file == "config.json" else "index-unusable"
    assert (finding.id, finding.severity, finding.where) == (kind, "error", file)
    assert found in finding.found and str(folder) not in finding.found
    status, result = run(folder, "--gpu", "cpu")
    assert (status, result["ok"], [f["id"] for f in result["findings"]]) == (1, False, [kind])


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("config.json", '{"model_type": "llama"}', "model_type is 'llama', expected 'deepseek_v4'"),
        ("config.json", '{"model_type": "deepseek_v4"}', "has no 'num_hidden_layers', has no 'hid"),
        (INDEX, '{"weight_map": []}', "weight_map is no object"),
        (INDEX, '{"weight_map": {"a": 1}}', "the shard of a is 1, expected a file's name"),
    ],
)
def test_what_is_wrong_inside_of_config_or_index_is_said(
    copy: Callable[[str], Path], file: str, text: str, found: str
) -> None:
    folder = copy("rtn")
    (folder / file).unlink()
    (folder / file).write_text(text)
    (finding,) = diagnose(folder, ON_CPU)
    assert found in finding.found


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        *((name, None, f"has no {name!r}") for name in DIMENSIONS),
        ("o_groups", 0, "o_groups is 0"),
        ("num_hidden_layers", -1, "num_hidden_layers is -1"),
        ("sliding_window", "wide", "sliding_window is 'wide'"),
        ("hc_mult", True, "hc_mult is True"),
        ("num_nextn_predict_layers", 1.5, "num_nextn_predict_layers is 1.5"),
        ("max_position_embeddings", 0, "max_position_embeddings is 0"),
    ],
)
def test_a_dimension_that_is_none_is_the_one_finding_of_doctor_and_an_error_of_serve(
    copy: Callable[[str], Path], name: str, value: Any, found: str
) -> None:
    folder = copy("rtn")
    if value is None:
        edit_config(folder, lambda config: config.pop(name))
    else:
        edit_config(folder, lambda config: config.update({name: value}))
    for where in (ON_CPU, on("H200", 2)):
        (finding,) = diagnose(folder, where)
        assert (finding.id, finding.where) == ("config-unusable", "config.json")
        assert found in finding.found
    with pytest.raises(GraftError, match=re.escape(found)):
        make_plan(ServeOptions(folder), "auto", named_gpus("H200", 2))


@pytest.mark.parametrize("value", [None, {}, "x", [0, "a", 4, 128, 0], [0, 0, 4, -1, 0]])
def test_ratios_that_are_none_are_a_finding_of_doctor_and_an_error_of_serve(
    copy: Callable[[str], Path], value: Any
) -> None:
    folder = copy("rtn")
    edit_config(folder, lambda config: config.update(compress_ratios=value))
    found = [f for f in diagnose(folder, ON_CPU) if f.severity == "error"]
    assert ids(found) == ["compress-ratios"] and found[0].found == repr(value)
    with pytest.raises(GraftError, match=re.escape(f"compress_ratios is {value!r}; expected a")):
        make_plan(ServeOptions(folder), "auto", named_gpus("H200", 1))


@pytest.mark.parametrize(
    ("place", "value"),
    [("ignore", [1]), ("ignore", {"lm_head": 1}), ("targets", [None]), ("weights", "int4")],
)
def test_lists_of_patterns_that_are_none_are_a_finding(
    copy: Callable[[str], Path], place: str, value: Any
) -> None:
    def damage(config: dict[str, Any]) -> None:
        section = config["quantization_config"]
        group = next(iter(section["config_groups"].values()))
        (section if place == "ignore" else group)[place] = value

    folder = copy("rtn")
    edit_config(folder, damage)
    (finding,) = diagnose(folder, ON_CPU)
    assert finding.id == "quantization-config" and "cannot be read" in finding.found


def test_what_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="gone: not a folder"):
        diagnose(tmp_path / "gone", ON_CPU)


# --fix

FIXABLE = [
    "shard-not-in-index",
    "tensor-not-in-index",
    "gate-up-down-names",
    "head-named-as-layer",
    "scale-inv",
    "scale-of-linears",
    "no-head-count",
    "head-compressed",
    "no-ratio-for-head",
    "target-for-mtp",
    "ignore-for-mtp",
    "one-family-of-names",
    "wrong-group-size-in-config",
]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


@pytest.mark.parametrize("name", FIXABLE)
def test_fix_writes_a_copy_without_the_defect(
    planted: Callable[[str], Path], good: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder, out = planted(name), tmp_path / "fixed"
    (finding,) = diagnose(folder, ON_CPU)
    assert finding.fixable
    before = snapshot(folder)
    write_corrected(read_survey(folder), out)
    assert snapshot(folder) == before
    assert ids(diagnose(out, ON_CPU)) == []
    check_index(out)
    expected, found = load_tensors(good["rtn"]), load_tensors(out)
    assert expected.keys() == found.keys()
    assert all(expected[n].view(-1).equal(found[n].view(-1)) for n in list(expected)[::97])
    base_shard = "model-00001-of-00003.safetensors"
    assert os.path.samefile(out / base_shard, folder / base_shard)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_findings_that_fix_cannot_cure_do_not_promise_it(planted: Callable[[str], Path]) -> None:
    (finding,) = diagnose(planted("missing-parameter"), ON_CPU)
    assert not finding.fixable


def test_fix_refuses_a_folder_that_exists_and_a_broken_shard(
    planted: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = planted("truncated-shard")
    with pytest.raises(GraftError, match=f"{HEAD}: .*--fix corrects config and names only"):
        write_corrected(read_survey(folder), tmp_path / "fixed")
    with pytest.raises(GraftError, match="already exists"):
        write_corrected(read_survey(folder), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rtn"]


def test_an_interrupted_fix_leaves_nothing(
    planted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = planted("scale-inv")

    def stop(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mtp_graft.serving.doctor.fix.write_index", stop)
    with pytest.raises(KeyboardInterrupt):
        write_corrected(read_survey(folder), tmp_path / "fixed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rtn"]


# The command


def run(*arguments: object) -> tuple[int, Any]:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json", "-"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout) if result.stdout else None


def test_the_command_exits_with_0_where_nothing_is_an_error(good: dict[str, Path]) -> None:
    status, result = run(good["rtn"], "--gpu", "H200")
    assert (status, result["ok"], result["tp"], result["fixed"]) == (0, True, 1, None)
    assert {f["severity"] for f in result["findings"]} == {"note"}
    assert run(good["rtn"], "--gpu", "RTX PRO 6000 Max-Q", "--count", 2)[0] == 0


def test_the_command_exits_with_1_for_an_error(planted: Callable[[str], Path]) -> None:
    status, result = run(planted("scale-inv"), "--gpu", "cpu")
    assert (status, result["ok"]) == (1, False)
    (finding,) = result["findings"]
    assert finding.keys() == Finding.__dataclass_fields__.keys()


def test_the_command_judges_the_fixed_copy(planted: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out = planted("scale-inv"), tmp_path / "fixed"
    status, result = run(folder, "--gpu", "cpu", "--fix", out)
    assert (status, result["ok"], result["fixed"]) == (0, True, str(out))
    assert ([f["id"] for f in result["findings"]], result["remaining"]) == (["scale-name"], [])
    again = tmp_path / "again"
    assert run(out, "--gpu", "cpu", "--fix", again)[0] == 0
    assert not again.exists()


def test_a_gpu_that_is_none_is_one_error(good: dict[str, Path]) -> None:
    with pytest.raises(GraftError, match="expected one"):
        run(good["rtn"], "--gpu", "H300")


def test_a_count_without_a_gpu_is_wrong_usage(good: dict[str, Path]) -> None:
    assert run(good["rtn"], "--count", "2")[0] == 2


def test_findings_are_shown_even_if_they_cannot_be_written(
    good: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise GraftError("the disk is full")

    monkeypatch.setattr("mtp_graft.cli.doctor.write_json", fail)
    result = CliRunner().invoke(app, ["doctor", str(good["base"])])
    assert isinstance(result.exception, GraftError)
    assert "head-absent" in result.stdout
