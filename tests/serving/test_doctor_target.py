"""Doctor on hardware and versions: ranks, memory, known issues, and the real model's size."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from mtp_graft.serving.command import ServeOptions, vllm_elsewhere
from mtp_graft.serving.doctor import diagnose, examine, target
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.doctor.findings import Finding
from mtp_graft.serving.doctor.target import Target, find_target
from mtp_graft.serving.plan import make_plan
from mtp_graft.serving.topology import named_hardware
from mtp_graft.stages.splice import splice
from serving.conftest import install_gpus
from serving.flash import flash

ON_CPU = Target(Version("0.32.0"), "cpu", find_target(gpu="cpu").hardware)


def on(gpu: str, count: int = 1, vllm: str | None = None, **more: Any) -> Target:
    found = find_target(gpu=gpu, count=count, **more)
    return replace(found, vllm=Version(vllm)) if vllm else found


def levels(findings: list[Finding]) -> dict[str, str]:
    return {f.id: f.severity for f in findings if f.severity != "note"}


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    for head in ("rtn", "mxfp4"):
        splice(tiny_model / "base", tiny_model / "upstream", folder / head, head, copy=True)
    return {name: folder / name for name in ("rtn", "mxfp4")}


def small_gpu(gib: float, max_model_len: int | None = None) -> Target:
    hardware = target.Hardware("small", 1, int(gib * 2**30))
    return Target(Version("0.33.0"), "cuda", hardware, 1, max_model_len)


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
        (on("cpu", vllm="0.31.1"), {"vllm-unsupported": "error"}),
        (on("H200", vllm="0.33.1"), {}),
        (on("H200", vllm="0.34.0"), {"vllm-untried": "warning"}),
        (on("RTX PRO 6000 Max-Q", 2, vllm="0.34.0"), {"vllm-untried": "warning"}),
        (on("cpu", vllm="0.33.0"), {"vllm-untried": "warning"}),
        (on("H200", max_model_len=8193), {"context-positions": "error"}),
        (on("cpu", max_model_len=8193), {"context-positions": "error"}),
        (on("H200", max_model_len=8192), {}),
        (small_gpu(4.0), {"memory-weights": "error"}),
        (small_gpu(4.5, 8192), {"memory-context": "error"}),
        (small_gpu(4.5), {"memory-context": "warning"}),
        (small_gpu(8.0), {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value.hardware),
)
def test_hardware_and_version_findings(
    good: dict[str, Path], where: Target, expected: dict[str, str]
) -> None:
    assert levels(diagnose(good["rtn"], where)) == expected


def test_mxfp4_experts_alone_would_divide_further(good: dict[str, Path]) -> None:
    assert "tp-groups" not in levels(diagnose(good["mxfp4"], on("H200", 2)))
    assert "tp-groups" in levels(diagnose(good["rtn"], on("H200", 4)))


def test_the_context_that_memory_allows_is_named_and_is_allowed(good: dict[str, Path]) -> None:
    (finding,) = (f for f in diagnose(good["rtn"], small_gpu(4.5)) if f.id == "memory-context")
    named = int(re.search(r"--max-model-len (\d+)", finding.expected)[1])  # type: ignore[index]
    assert named > 0
    assert "memory-context" not in levels(diagnose(good["rtn"], small_gpu(4.5, named)))
    assert "memory-context" in levels(diagnose(good["rtn"], small_gpu(4.5, named + 512)))


@pytest.mark.parametrize(
    ("plugin_found", "allowed", "expected"),
    [
        (False, None, {"plugin-missing": "error"}),
        (True, "other", {"plugin-missing": "warning"}),
        (True, "other,mtp_graft", {}),
        (True, None, {}),
    ],
)
def test_a_plugin_that_will_not_load_is_found(
    good: dict[str, Path], plugin_found: bool, allowed: str | None, expected: dict[str, str]
) -> None:
    where = replace(ON_CPU, installed=True, plugin_found=plugin_found, plugins_allowed=allowed)
    assert levels(diagnose(good["rtn"], where)) == expected


# The real model's size


@pytest.fixture(scope="module")
def full_size() -> Checkpoint:
    return flash()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (on("RTX PRO 6000 Max-Q", 2), {"vllm-51513"}),
        (on("RTX PRO 6000 Max-Q", 1), {"memory-weights"}),
        (on("RTX PRO 6000 Server", 4), set()),
        (on("H100", 2), {"memory-weights"}),
        (on("H100", 4), set()),
        (on("H200", 1), {"memory-weights"}),
        (on("H200", 2, max_model_len=2**20), set()),
        (on("H200", 8), set()),
        (on("GB10", 2), {"vllm-46307"}),
        (ON_CPU, {"memory-weights"}),
    ],
    ids=lambda value: str(value.hardware) if isinstance(value, Target) else "",
)
def test_flash_on_the_hardware_that_the_project_names(
    full_size: Checkpoint, where: Target, expected: set[str]
) -> None:
    found = examine(full_size, where)
    assert set(levels(found)) == expected
    assert not (where.hardware and where.hardware.unified_memory) or "85% of each" in str(found)


def test_the_stand_in_is_what_was_published(full_size: Checkpoint) -> None:
    base = {name: t for name, t in full_size.tensors.items() if not name.startswith("mtp.")}
    size = sum(t.numel() * t.element_size() for t in base.values())
    assert len(base) == 100_652
    assert sum(name.endswith(".weight_scale") for name in base) == 33_405
    assert size / 2**30 == pytest.approx(142, abs=0.5)


# Ranks


def test_ranks_are_a_power_of_two_of_the_gpus_as_serve_takes_them(good: dict[str, Path]) -> None:
    assert [find_target(gpu="H200", count=n).tp for n in (1, 2, 3, 6, 8)] == [1, 2, 2, 4, 8]
    options, gpus = ServeOptions(good["rtn"]), named_hardware("H200", 4)
    where = on("H200", 4, checkpoint=good["rtn"])
    assert where.tp == make_plan(options, "auto", gpus).options.num_ranks
    assert levels(diagnose(good["rtn"], where)) == {}


def test_a_config_that_cannot_be_read_does_not_keep_doctor_from_saying_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v4", "o_groups": "many"}')
    where = on("H200", 3, checkpoint=tmp_path)
    assert where.tp == 2
    assert levels(diagnose(tmp_path, where)) == {"config-unusable": "error"}


def test_gpus_that_cannot_be_asked_are_unknown_and_the_rest_is_checked(
    good: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    install_gpus(monkeypatch, error="Driver Not Loaded")
    monkeypatch.setattr(target, "installed_vllm", vllm_elsewhere)
    found = find_target()
    assert (found.hardware, found.platform, found.tp) == (None, "cuda", 1)
    unknown, *rest = diagnose(good["rtn"], found)
    assert (unknown.id, unknown.severity) == ("gpus-unknown", "warning")
    assert "Driver Not Loaded" in unknown.found
    assert "piecewise-graphs" in [f.id for f in rest]
