"""Doctor: nothing on good checkpoints, each planted defect by its id alone, and what --fix does."""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from mtp_graft.errors import GraftError
from mtp_graft.serving import command
from mtp_graft.serving.command import ServeOptions, vllm_elsewhere
from mtp_graft.serving.doctor import diagnose, examine, hardware, tensors
from mtp_graft.serving.doctor.checkpoint import read_checkpoint
from mtp_graft.serving.doctor.findings import KINDS, Finding
from mtp_graft.serving.doctor.hardware import Target, find_target
from mtp_graft.serving.plan import make_plan
from mtp_graft.serving.topology import Hardware, named_hardware
from mtp_graft.stages.splice import open_base
from serving.conftest import install_gpus
from serving.doctor_defects import DEFECTS, INDEX, LFS_POINTER, changed, errors, set_config
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


def warnings(*ids: str) -> dict[str, str]:
    return dict.fromkeys(ids, "warning")


@pytest.mark.parametrize("variant", ["rtn", "mxfp4", "bf16"])
def test_a_good_checkpoint_has_no_errors(spliced: dict[str, Path], variant: str) -> None:
    for gpu in ("cpu", "H200", "RTX PRO 6000 Server"):
        found = levels(diagnose(spliced[variant], find_target(gpu=gpu)))
        assert found == ({} if gpu in ("cpu", "H200") else {"vllm-36889": "warning"})


def test_the_published_base_has_notes_alone_and_nothing_to_fix() -> None:
    full_size = flash()
    base = {name: t for name, t in full_size.tensors.items() if not name.startswith("mtp.")}
    assert sum(t.nbytes for t in base.values()) / 2**30 == pytest.approx(142, abs=0.5)
    found = examine(full_size, on("H200", 2))
    notes = {f.id: f.found for f in found}
    assert levels(found) == {} and not any(f.fixable for f in found)
    assert "(108 in all)" in notes["float32-rounded"] and "(145 in all)" in notes["compressor-fp8"]


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


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize("text", [None, '{"weight_map": 1}'])
def test_an_unusable_config_or_index_is_a_finding(copy: Path, file: str, text: str | None) -> None:
    (copy / file).unlink()
    if text is not None:
        (copy / file).write_text(text)
    (finding,) = diagnose(copy, ON_CPU)
    kind = "config-unusable" if file == "config.json" else "index-unusable"
    assert (finding.id, finding.severity, finding.where) == (kind, "error", file)
    assert str(copy) not in finding.found


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("model_type", "llama", "model_type is 'llama'"),
        ("hidden_size", None, "hidden_size is None"),
        ("n_routed_experts", 10**9, "n_routed_experts is 1000000000"),
        ("sliding_window", "wide", "sliding_window is 'wide'"),
        ("num_nextn_predict_layers", 1.5, "num_nextn_predict_layers is 1.5"),
    ],
)
def test_a_bad_dimension_is_the_one_finding(copy: Path, name: str, value: Any, found: str) -> None:
    set_config(name, value)(copy)
    (finding,) = diagnose(copy, on("H200"))
    assert finding.id == "config-unusable" and found in finding.found
    with pytest.raises(GraftError, match=re.escape(found)):
        make_plan(ServeOptions(copy), "auto", named_hardware("H200", 2))


@pytest.mark.parametrize("value", [None, {}, [0, 0, 4], [0, "a", 4, 128, 0], [0, 0, 4, -1, 0]])
def test_wrong_compress_ratios_are_an_error(copy: Path, value: Any) -> None:
    set_config("compress_ratios", value)(copy)
    (finding,) = (f for f in diagnose(copy, ON_CPU) if f.id == "compress-ratios")
    assert (finding.severity, finding.fixable) == ("error", False)
    assert finding.found in (repr(value), "3 entries")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (on("H200", 4), {"tp-heads": "error", "tp-groups": "error"}),
        (on("H200", 1, tp=2), {"gpu-count": "error"}),
        (on("RTX PRO 6000 Max-Q", 2), warnings("vllm-51513", "vllm-50196", "vllm-36889")),
        (on("GB10", 2), warnings("vllm-46307", "vllm-50196", "vllm-36889")),
        (on("H200", vllm="0.31.1"), {"vllm-unsupported": "error"}),
        (on("H200", vllm="0.33.1"), {}),
        (on("RTX PRO 6000 Max-Q", 2, vllm="0.34.0"), {"vllm-untried": "warning"}),
        (on("H200", max_model_len=8193), {"context-positions": "error"}),
        (on("H200", max_model_len=8192), {}),
        (small_gpu(4.0), {"memory-weights": "error"}),
        (small_gpu(4.5, 8192), {"memory-context": "error"}),
        (small_gpu(4.5), {"memory-context": "warning"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value.hardware),
)
def test_hardware_and_version_findings(good: Path, where: Target, expected: dict[str, str]) -> None:
    assert levels(diagnose(good, where)) == expected


def test_the_context_that_memory_allows_is_named_and_is_allowed(good: Path) -> None:
    (finding,) = (f for f in diagnose(good, small_gpu(4.5)) if f.id == "memory-context")
    named = int(re.search(r"--max-model-len (\d+)", finding.expected)[1])  # type: ignore[index]
    assert named > 0
    assert "memory-context" not in levels(diagnose(good, small_gpu(4.5, named)))
    assert "memory-context" in levels(diagnose(good, small_gpu(4.5, named + 512)))


def test_a_plugin_that_will_not_load_is_found(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*installed: str) -> dict[str, str]:
        points = [EntryPoint(name, "x", "vllm.general_plugins") for name in installed]
        monkeypatch.setattr(hardware, "entry_points", lambda group: points)
        return levels(diagnose(good, find_target()))

    monkeypatch.setattr(command, "installed_vllm", lambda: vllm_elsewhere("cpu"))
    assert (found(), found("mtp_graft")) == ({"plugin-missing": "error"}, {})
    for allowed, expected in (("other", warnings("plugin-missing")), ("other,mtp_graft", {})):
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
        assert found("mtp_graft") == expected


def test_ranks_are_a_power_of_two_of_the_gpus_as_serve_takes_them(good: Path, copy: Path) -> None:
    assert [find_target(gpu="H200", count=n).tp for n in (1, 2, 3, 6, 8)] == [1, 2, 2, 4, 8]
    where = on("H200", 4, checkpoint=good)
    plan = make_plan(ServeOptions(good), "auto", named_hardware("H200", 4))
    assert where.tp == plan.options.num_ranks and levels(diagnose(good, where)) == {}
    set_config("o_groups", "many")(copy)
    assert on("H200", 3, checkpoint=copy).tp == 2


def test_gpus_that_do_not_answer_are_unknown(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, error="Driver Not Loaded")
    monkeypatch.setattr(command, "installed_vllm", vllm_elsewhere)
    found = find_target()
    assert (found.hardware, found.platform, found.tp) == (None, "cuda", 1)
    unknown, *rest = diagnose(good, found)
    assert (unknown.id, unknown.severity) == ("gpus-unknown", "warning")
    assert "Driver Not Loaded" in unknown.found and "piecewise-graphs" in ids(rest)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert ids(diagnose(good, find_target()), "error") == ["gpus-hidden"]


def test_without_vllm_doctor_says_so(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "installed_vllm", lambda: None)
    install_gpus(monkeypatch, error="Driver Not Loaded")
    where = find_target()
    assert (where.vllm, where.platform, where.hardware) == (None, None, None)
    assert ids(diagnose(good, where)) == ["vllm-unknown"]


@pytest.mark.parametrize(
    ("gpu", "vllm", "errors"),
    [
        ((12, 1), "0.33.0", set()),
        ((9, 0), "0.27.1", {"vllm-unsupported", "vllm-51970"}),
        ((12, 0), "0.22.0", {"vllm-unsupported", "vllm-40923", "vllm-51593"}),
    ],
)
def test_finds_known_issues(good: Path, gpu: tuple[int, int], vllm: str, errors: set[str]) -> None:
    hardware = Hardware("GPU", 1, 80 * 2**30, capability=gpu)
    found = diagnose(good, Target(Version(vllm), "cuda", hardware))
    assert set(ids(found, "error")) == errors
    assert {"vllm-40969", "vllm-36889"}.issubset(ids(found)) is (gpu == (12, 1))


@given(st.integers(1, 20), st.integers(0, 9), st.sampled_from(["0.32.0", "0.33.0", "0.33.1"]))
@settings(deadline=None)
def test_doctor_and_serve_refuse_alike(good: Path, major: int, minor: int, vllm: str) -> None:
    gpu = Hardware("GPU", 1, 80 * 2**30, capability=(major, minor))
    target = Target(Version(vllm), "cuda", gpu)
    errors = ids(list(hardware.known_issues(read(good), target)), "error")
    is_known = major in (9, 10, 12)
    assert errors == ([] if is_known else ["gpu-capability"])
    with nullcontext() if is_known else pytest.raises(GraftError, match="expected 9, 10 or 12"):
        make_plan(ServeOptions(good), "auto", gpu)


read = cache(read_checkpoint)
SMALL = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json")


@given(
    name=st.sampled_from((*SMALL, "special_tokens_map.json", "chat_template.jinja")),
    data=st.binary(max_size=30)
    | st.integers(0, 26).map(lambda size: b'{"model": {"type": "BPE"}}'[:size])
    | st.sampled_from([b"[]", b"[" * 10**5, LFS_POINTER]),
)
@settings(deadline=None, derandomize=True)
def test_a_small_file_is_an_object_or_a_finding(good: Path, name: str, data: bytes) -> None:
    checkpoint = read(good)
    with TemporaryDirectory() as folder:
        checkpoint.folder = Path(folder)
        for each in {*SMALL[:3], INDEX} - {name}:
            (checkpoint.folder / each).symlink_to(good / each)
        (checkpoint.folder / name).write_bytes(data)
        found = ids(list(tensors.files(checkpoint, ON_CPU)))
    try:
        is_right = name.endswith("jinja") or isinstance(json.loads(data), dict)
        is_right = is_right and (name != "tokenizer.json" or b'"type"' in data)
        is_right = is_right and bool(data.decode()) and data != LFS_POINTER
    except (ValueError, RecursionError):
        is_right = False
    assert found == ([] if is_right else ["file-unreadable"])


def test_a_device_in_place_of_a_small_file_is_a_finding(copy: Path) -> None:
    (copy / "added_tokens.json").symlink_to("/dev/zero")
    assert ids(diagnose(copy, ON_CPU)) == ["file-unreadable"]


OTHER_MODULES = ("head", "embed", "layers.3.ffn.gate", "layers.2.attn.wo_a", "layers.1.attn.wkv")
PLACES = st.integers(0, 3), st.integers(0, 63), st.integers(1, 3)


@given(
    st.sampled_from(OTHER_MODULES) | st.builds("layers.{}.ffn.experts.{}.w{}".format, *PLACES),
    st.sampled_from(("plain", "fp8", "mxfp4", "int4", "int8", "int4-asymmetric", "int6")),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_module_that_vllm_cannot_build_is_named(tiny_base: Path, module: str, kind: str) -> None:
    found = errors(changed(tiny_base, {module: kind}, lambda _section: None))
    usual = "int4" if "experts" in module else "fp8" if "attn" in module else "plain"
    wrong = "never-quantized" if usual == "plain" else "scheme-mismatch"
    assert found.keys() == ({wrong} if kind != usual else set())
    assert all(module in where for where in found.values())


LAYER_1, OTHERS = (rf"re:.*layers\.{n}\.ffn\.experts\..*" for n in ("1", "[^1]"))
INT = {"num_bits": 4, "strategy": "group", "group_size": 32}
INT4_ATTENTION = "a checkpoint with int4 attention or shared experts"
ATTENTION = r"layers\.\d\.attn\.(w.*|indexer\.wq_b)"


def other_group(targets: list[str], **weights: int) -> Callable[[Any], None]:
    """Return what gives `targets` integers of another kind, and layer 1's to no other group."""

    def edit(section: Any) -> None:
        group = section["config_groups"]["group_1"]
        more = {"targets": targets, "weights": group["weights"] | weights}
        section["config_groups"] |= {"group_1": group | {"targets": [OTHERS]}, "more": group | more}

    return edit


def split_matrices(section: Any) -> None:
    group = section["config_groups"]["group_1"]
    weights = group["weights"] | {"actorder": "weight"}
    first = group | {"targets": [r"re:.*\.(w2|down_proj)$"], "weights": weights}
    section["config_groups"] = {"first": first, **section["config_groups"]}


def add_target(target: str) -> Callable[[Any], None]:
    return lambda section: section["config_groups"]["group_0"]["targets"].append(target)


INPUTS = {"input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor"}}


@pytest.mark.parametrize(
    ("kinds", "edit", "expected"),
    [
        ({r"layers\.1\.ffn\.experts.*": "int4/64"}, other_group([LAYER_1], group_size=64), None),
        ({r"layers\.1\.ffn\.experts.*": "int8"}, other_group([LAYER_1]), "scheme-mismatch"),
        ({r"layers\.1\.ffn\.experts.*": "int4/64"}, lambda _: None, "group-size"),
        ({}, other_group([LAYER_1, "re:nothing"], group_size=32), "group-size"),
        ({}, lambda s: s["config_groups"].update(a={"targets": ["x"], "weights": INT}), None),
        ({}, split_matrices, "pattern-too-wide"),
        ({}, other_group([LAYER_1], actorder="weight"), None),
        ({}, add_target(r"re:.*\.embed_tokens$"), "scheme-mismatch"),
        ({}, add_target(r"re:(lm_head|.*\.ffn\.gate)$"), None),
        ({}, lambda s: s["config_groups"]["group_0"].update(INPUTS), "scheme-mismatch"),
        ({ATTENTION: "plain"}, lambda s: s["config_groups"].pop("group_0"), None),
        ({".*": "plain"}, lambda s: s.clear(), "a checkpoint without quantization"),
        ({ATTENTION: "int4"}, lambda s: s["config_groups"].pop("group_0"), INT4_ATTENTION),
        ({r".*\.experts.*": "int3"}, lambda _: None, "a checkpoint with int3 routed experts"),
        ({r".*\.experts.*": "int8-asymmetric"}, lambda _: None,
         "a checkpoint with int8-asymmetric routed experts"),
    ],
)  # fmt: skip
def test_schemes_as_in_vllm(tiny_base: Path, kinds: Any, edit: Any, expected: str | None) -> None:
    checkpoint = changed(tiny_base, kinds, edit)
    assert (checkpoint.foreign_format or ", ".join(errors(checkpoint)) or None) == expected


@pytest.mark.parametrize(
    ("kinds", "why"),
    [
        ({ATTENTION: "plain"}, "its attention is not quantized; expected FP8"),
        ({ATTENTION: "int4"}, f"is {INT4_ATTENTION}; expected a W4A16-FP8"),
    ],
)
def test_base_named(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, kinds: Any, why: str) -> None:
    checkpoint = changed(tiny_base, kinds, lambda section: section.update(config_groups={}))
    monkeypatch.setattr("mtp_graft.stages.splice.read_checkpoint", lambda _folder: checkpoint)
    with pytest.raises(GraftError, match=why):
        open_base(tiny_base)
