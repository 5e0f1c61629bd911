"""Doctor: nothing on good checkpoints, each planted defect by its id alone, and what --fix does."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
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
from mtp_graft.serving.command import ServeOptions, vllm_elsewhere
from mtp_graft.serving.doctor import diagnose, examine, fix, hardware
from mtp_graft.serving.doctor.findings import KINDS, Finding
from mtp_graft.serving.doctor.hardware import Target, find_target
from mtp_graft.serving.plan import make_plan
from mtp_graft.serving.topology import Hardware, named_hardware
from serving.conftest import install_gpus
from serving.doctor_defects import DEFECTS, HEAD, INDEX, edit_shard, rename, section, set_config
from serving.flash import flash

ON_CPU = Target(Version("0.32.0"), "cpu", find_target(gpu="cpu").hardware)
Plant = Callable[[str], Path]


def on(gpu: str, count: int = 1, vllm: str | None = None, **more: Any) -> Target:
    found = find_target(gpu=gpu, count=count, **more)
    return replace(found, vllm=Version(vllm)) if vllm else found


def small_gpu(gib: float, max_model_len: int | None = None) -> Target:
    gpu = Hardware("small", 1, int(gib * 2**30))
    return Target(Version("0.33.0"), "cuda", gpu, 1, max_model_len)


def ids(findings: list[Finding], *severities: str) -> list[str]:
    return [f.id for f in findings if not severities or f.severity in severities]


def levels(findings: list[Finding]) -> dict[str, str]:
    return {f.id: f.severity for f in findings if f.severity != "note"}


@pytest.fixture(scope="session")
def good(spliced: dict[str, Path]) -> Path:
    """A checkpoint with a head in INT4."""
    return spliced["rtn"]


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """The same by links, for defects, which replace files and never write to them."""
    return shutil.copytree(good, tmp_path / "rtn", copy_function=os.link)


@pytest.fixture
def planted(copy: Path) -> Plant:
    def plant(name: str) -> Path:
        DEFECTS[name][1](copy)
        return copy

    return plant


# Good checkpoints, published ones and those of others


@pytest.mark.parametrize("variant", ["rtn", "mxfp4", "bf16"])
def test_a_good_checkpoint_has_no_errors_or_warnings(
    spliced: dict[str, Path], variant: str
) -> None:
    for gpu in ("cpu", "H200", "RTX PRO 6000 Server"):
        assert levels(diagnose(spliced[variant], find_target(gpu=gpu))) == {}


def test_the_published_base_has_notes_alone_and_nothing_to_fix() -> None:
    full_size = flash()
    base = {name: t for name, t in full_size.tensors.items() if not name.startswith("mtp.")}
    assert len(base) == 100_652 and sum(n.endswith(".weight_scale") for n in base) == 33_405
    assert sum(t.nbytes for t in base.values()) / 2**30 == pytest.approx(142, abs=0.5)
    found = examine(full_size, on("H200", 2))
    notes = {f.id: f.found for f in found}
    assert levels(found) == {} and not any(f.fixable for f in found)
    assert "(108 in all)" in notes["float32-rounded"] and "(145 in all)" in notes["compressor-fp8"]


def as_deepseek(folder: Path) -> None:
    rename(r"weight_scale$", "scale")(folder)
    set_config("quantization_config", {"quant_method": "fp8"})(folder)


def as_modelopt(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')


def as_mlx(folder: Path) -> None:
    set_config("quantization", {"bits": 4})(folder)
    set_config("quantization_config", None)(folder)


as_gptq = section(lambda q: q.update(quant_method="gptq"))


@pytest.mark.parametrize(
    ("make", "maker"),
    [(as_deepseek, "DeepSeek's"), (as_modelopt, "ModelOpt"), (as_mlx, "MLX"), (as_gptq, "gptq")],
)
def test_another_format_is_named_and_left_alone(
    copy: Path, make: Callable[[Path], None], maker: str, tmp_path: Path
) -> None:
    make(copy)
    (finding,) = diagnose(copy, ON_CPU)
    assert finding.id == "foreign-format" and maker in finding.found
    assert run(copy, "--gpu", "cpu", "--fix", tmp_path / "fixed")[0] == 0
    assert not (tmp_path / "fixed").exists()


# Planted defects


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found_by_its_id_and_no_other(planted: Plant, name: str) -> None:
    folder, expected = planted(name), [DEFECTS[name][0]]
    found = diagnose(folder, ON_CPU)
    assert ids(found) == expected
    on_gpu = ids(diagnose(folder, on("H200")))
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


def test_several_defects_are_as_many_findings_errors_first(planted: Plant) -> None:
    for name in ("rounded-float32", "head-count-0"):
        planted(name)
    found = diagnose(planted("scale-inv"), ON_CPU)
    assert ids(found) == ["scale-name", "nextn-count", "float32-rounded"]


def test_names_of_experts_matter_by_platform(planted: Plant) -> None:
    folder = planted("one-family-of-names")
    assert levels(diagnose(folder, ON_CPU)) == {"expert-target-names": "error"}
    assert levels(diagnose(folder, on("H200"))) == {"expert-target-names": "warning"}


def test_copies_of_embedding_and_lm_head_are_known_on_gpus(copy: Path) -> None:
    names = ("mtp.0.head.weight", "mtp.0.emb.tok_emb.weight")
    edit_shard(copy, lambda t: t | {name: torch.zeros(4, 4) for name in names})
    assert ids(diagnose(copy, on("H200")), "error") == []
    assert ids(diagnose(copy, ON_CPU), "error") == ["head-tensor-unknown"]


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize("text", [None, "{'a': 1}", '{"weight_map": 1}'])
def test_a_config_or_index_that_cannot_be_used_is_the_one_finding(
    copy: Path, file: str, text: str | None
) -> None:
    (copy / file).unlink()
    if text is not None:
        (copy / file).write_text(text)
    status, result = run(copy, "--gpu", "cpu")
    (finding,) = result["findings"]
    kind = "config-unusable" if file == "config.json" else "index-unusable"
    assert (status, result["ok"], finding["id"], finding["where"]) == (1, False, kind, file)
    assert str(copy) not in finding["found"]


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
    copy: Path, name: str, value: Any, found: str
) -> None:
    set_config(name, value)(copy)
    (finding,) = diagnose(copy, on("H200"))
    assert finding.id == "config-unusable" and found in finding.found
    with pytest.raises(GraftError, match=re.escape(found)):
        make_plan(ServeOptions(copy), "auto", named_hardware("H200", 2))


@pytest.mark.parametrize("value", [None, {}, [0, 0, 4], [0, "a", 4, 128, 0], [0, 0, 4, -1, 0]])
def test_ratios_that_are_none_are_an_error(copy: Path, value: Any) -> None:
    set_config("compress_ratios", value)(copy)
    (finding,) = (f for f in diagnose(copy, ON_CPU) if f.id == "compress-ratios")
    assert (finding.severity, finding.fixable) == ("error", False)
    assert finding.found in (repr(value), "3 entries")


def test_a_section_that_vllm_cannot_read_is_a_finding(copy: Path) -> None:
    section(lambda q: q["config_groups"]["group_1"].update(weights="int4"))(copy)
    (finding,) = diagnose(copy, ON_CPU)
    assert finding.id == "quantization-config" and "group_1.weights" in finding.found


# vLLM and hardware


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (on("H200", 3, tp=3), {"tp-heads": "error", "tp-groups": "error"}),
        (on("H200", 4), {"tp-heads": "error", "tp-groups": "error"}),
        (on("H200", 1, tp=2), {"gpu-count": "error"}),
        (on("RTX PRO 6000 Max-Q", 1), {}),
        (on("RTX PRO 6000 Max-Q", 2), {"vllm-51513": "warning", "vllm-50196": "warning"}),
        (on("GB10", 2), {"vllm-46307": "warning", "vllm-50196": "warning"}),
        (on("H200", vllm="0.31.1"), {"vllm-unsupported": "error"}),
        (on("H200", vllm="0.33.1"), {}),
        (on("RTX PRO 6000 Max-Q", 2, vllm="0.34.0"), {"vllm-untried": "warning"}),
        (on("cpu", vllm="0.33.0"), {"vllm-untried": "warning"}),
        (on("H200", max_model_len=8193), {"context-positions": "error"}),
        (on("H200", max_model_len=8192), {}),
        (small_gpu(4.0), {"memory-weights": "error"}),
        (small_gpu(4.5, 8192), {"memory-context": "error"}),
        (small_gpu(4.5), {"memory-context": "warning"}),
        (small_gpu(8.0), {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value.hardware),
)
def test_hardware_and_version_findings(good: Path, where: Target, expected: dict[str, str]) -> None:
    assert levels(diagnose(good, where)) == expected


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (on("RTX PRO 6000 Max-Q", 2), {"vllm-51513"}),
        (on("H100", 2), {"memory-weights"}),
        (on("H200", 2, max_model_len=2**20), set()),
        (on("GB10", 2), {"vllm-46307"}),
        (ON_CPU, {"memory-weights"}),
    ],
    ids=lambda value: str(value.hardware) if isinstance(value, Target) else "",
)
def test_flash_on_the_hardware_that_the_project_names(where: Target, expected: set[str]) -> None:
    found = examine(flash(), where)
    assert set(levels(found)) == expected
    assert not (where.hardware and where.hardware.unified_memory) or "85% of each" in str(found)


def test_the_context_that_memory_allows_is_named_and_is_allowed(good: Path) -> None:
    (finding,) = (f for f in diagnose(good, small_gpu(4.5)) if f.id == "memory-context")
    named = int(re.search(r"--max-model-len (\d+)", finding.expected)[1])  # type: ignore[index]
    assert named > 0
    assert "memory-context" not in levels(diagnose(good, small_gpu(4.5, named)))
    assert "memory-context" in levels(diagnose(good, small_gpu(4.5, named + 512)))


@pytest.mark.parametrize(
    ("installed", "allowed", "expected"),
    [
        ([], None, {"plugin-missing": "error"}),
        (["mtp_graft"], "other", {"plugin-missing": "warning"}),
        (["mtp_graft"], "other,mtp_graft", {}),
        (["mtp_graft"], None, {}),
    ],
)
def test_a_plugin_that_will_not_load_is_found(
    good: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: list[str],
    allowed: str | None,
    expected: dict[str, str],
) -> None:
    points = [EntryPoint(name, "x", "vllm.general_plugins") for name in installed]
    monkeypatch.setattr(hardware, "entry_points", lambda group: points)
    monkeypatch.setattr(command, "installed_vllm", lambda: vllm_elsewhere("cpu"))
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    assert levels(diagnose(good, find_target())) == expected


def test_ranks_are_a_power_of_two_of_the_gpus_as_serve_takes_them(good: Path, copy: Path) -> None:
    assert [find_target(gpu="H200", count=n).tp for n in (1, 2, 3, 6, 8)] == [1, 2, 2, 4, 8]
    where = on("H200", 4, checkpoint=good)
    plan = make_plan(ServeOptions(good), "auto", named_hardware("H200", 4))
    assert where.tp == plan.options.num_ranks and levels(diagnose(good, where)) == {}
    set_config("o_groups", "many")(copy)
    assert on("H200", 3, checkpoint=copy).tp == 2


def test_gpus_that_cannot_be_asked_are_unknown_and_the_rest_is_checked(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gpus(monkeypatch, error="Driver Not Loaded")
    monkeypatch.setattr(command, "installed_vllm", vllm_elsewhere)
    found = find_target()
    assert (found.hardware, found.platform, found.tp) == (None, "cuda", 1)
    unknown, *rest = diagnose(good, found)
    assert (unknown.id, unknown.severity) == ("gpus-unknown", "warning")
    assert "Driver Not Loaded" in unknown.found and "piecewise-graphs" in ids(rest)


def test_without_vllm_doctor_says_what_it_left_out(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "installed_vllm", lambda: None)
    install_gpus(monkeypatch, error="Driver Not Loaded")
    where = find_target()
    assert (where.vllm, where.platform, where.hardware) == (None, None, None)
    assert ids(diagnose(good, where)) == ["vllm-unknown"]


# --fix and the command


def run(*arguments: object) -> tuple[int, Any]:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json", "-"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout) if result.stdout else None


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


#: Defects of which doctor says that --fix cures them.
FIXABLE = [name for name, (kind, _) in DEFECTS.items() if KINDS[kind].cure.startswith("--fix")]


@pytest.mark.parametrize("name", FIXABLE)
def test_fix_writes_a_copy_without_the_defect(
    planted: Plant, good: Path, tmp_path: Path, name: str
) -> None:
    folder, out = planted(name), tmp_path / "fixed"
    before = snapshot(folder)
    status, result = run(folder, "--gpu", "cpu", "--fix", out)
    assert (status, result["fixed"], result["remaining"]) == (0, str(out), [])
    assert snapshot(folder) == before
    read_meta(out, complete=True)
    expected, found = load_tensors(good), load_tensors(out)
    assert expected.keys() == found.keys()
    assert all(expected[n].view(-1).equal(found[n].view(-1)) for n in list(expected)[::97])
    base_shard = "model-00001-of-00003.safetensors"
    assert os.path.samefile(out / base_shard, folder / base_shard)
    assert run(out, "--gpu", "cpu", "--fix", tmp_path / "again")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fixed", "rtn"]


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
    good: Path, planted: Plant, tmp_path: Path
) -> None:
    status, result = run(good, "--gpu", "H200")
    assert (status, result["ok"], result["tp"], result["fixed"]) == (0, True, 1, None)
    status, result = run(planted("wrong-group"), "--gpu", "cpu")
    (finding,) = result["findings"]
    keys = {"id", "severity", "where", "found", "expected", "why", "cure", "fixable", "evidence"}
    assert (status, result["ok"], finding.keys()) == (1, False, keys)
    assert finding["where"] == "mtp.0.ffn.experts.3.w2.weight_scale"
    assert finding["found"].startswith("[256, 4]") and finding["expected"].startswith("[256, 2]")
    assert run(good, "--count", "2")[0] == 2
    with pytest.raises(GraftError, match="gone: not a folder"):
        run(tmp_path / "gone", "--gpu", "cpu")
