"""Doctor on hardware and versions: ranks, memory, known issues, and the real model's size."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mtp_graft.serving.doctor.survey import Survey
from packaging.version import Version

from mtp_graft.serving.command import ServeOptions, vllm_elsewhere
from mtp_graft.serving.doctor import diagnose, examine, target
from mtp_graft.serving.doctor.findings import Finding
from mtp_graft.serving.doctor.target import Target, find_target
from mtp_graft.serving.plan import make_plan
from mtp_graft.serving.topology import named_gpus
from mtp_graft.stages.splice import splice
from serving.conftest import install_gpus
from serving.flash_headers import flash

ON_CPU = Target(Version("0.32.0"), "cpu", find_target(gpu="cpu").hardware)


def on(gpu: str, count: int = 1, vllm: str | None = None, **more: Any) -> Target:
    found = find_target(gpu=gpu, count=count, **more)
    return replace(found, vllm=Version(vllm)) if vllm else found


def ids(findings: list[Finding], *severities: str) -> list[str]:
    return [f.id for f in findings if not severities or f.severity in severities]


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    splice(tiny_model / "base", tiny_model / "upstream", folder / "rtn", "rtn", copy=True)
    splice(tiny_model / "base", tiny_model / "upstream", folder / "mxfp4", "mxfp4", copy=True)
    return {name: folder / name for name in ("rtn", "mxfp4")}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (on("H200", 3, tp=3), {"tp-heads": "error", "tp-groups": "error"}),
        (on("H200", 4), {"tp-heads": "error", "tp-groups": "error"}),
        (on("H200", 1, tp=2), {"gpu-count": "error"}),
        (on("RTX PRO 6000 Max-Q", 2), {"vllm-51513": "warning", "vllm-50196": "warning"}),
        (on("RTX PRO 6000 Server", 2), {"vllm-51513": "warning", "vllm-50196": "warning"}),
        (on("GB10", 2), {"vllm-46307": "warning", "vllm-50196": "warning"}),
        (on("H200", vllm="0.31.1"), {"vllm-unsupported": "error"}),
        (on("cpu", vllm="0.31.1"), {"vllm-unsupported": "error"}),
        (on("H200", vllm="0.33.1"), {}),
        (on("H200", vllm="0.34.0"), {"vllm-untried": "warning"}),
        (on("cpu", vllm="0.33.0"), {"vllm-untried": "warning"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value.hardware),
)
def test_hardware_and_version_findings(
    good: dict[str, Path], where: Target, expected: dict[str, str]
) -> None:
    found = diagnose(good["rtn"], where)
    assert {f.id: f.severity for f in found if f.severity != "note"} == expected


def test_mxfp4_experts_divide_further_than_int4_ones(good: dict[str, Path]) -> None:
    assert "tp-groups" not in ids(diagnose(good["mxfp4"], on("H200", 2)))
    assert "tp-groups" in ids(diagnose(good["rtn"], on("H200", 4)))


def small_gpu(gib: float, max_model_len: int | None = None) -> Target:
    hardware = target.Hardware("small", 1, int(gib * 2**30))
    return Target(Version("0.33.0"), "cuda", hardware, 1, max_model_len)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (small_gpu(4.0), [("memory-weights", "error")]),
        (small_gpu(4.5, 8192), [("memory-context", "error")]),
        (small_gpu(4.5), [("memory-context", "warning")]),
        (small_gpu(8.0), []),
    ],
)
def test_memory_is_estimated(
    good: dict[str, Path], where: Target, expected: list[tuple[str, str]]
) -> None:
    found = [(f.id, f.severity) for f in diagnose(good["rtn"], where) if f.severity != "note"]
    assert found == expected


def test_the_context_that_memory_allows_is_named_and_is_allowed(good: dict[str, Path]) -> None:
    (finding,) = (f for f in diagnose(good["rtn"], small_gpu(4.5)) if f.id == "memory-context")
    named = int(re.search(r"--max-model-len (\d+)", finding.cure)[1])  # type: ignore[index]
    assert named > 0
    assert "memory-context" not in ids(diagnose(good["rtn"], small_gpu(4.5, named)))
    assert "memory-context" in ids(diagnose(good["rtn"], small_gpu(4.5, named + 512)))


@pytest.mark.parametrize(
    ("plugin_found", "allowed", "expected"),
    [
        (False, None, [("plugin-missing", "error")]),
        (True, "other", [("plugin-missing", "warning")]),
        (True, "other,mtp_graft", []),
        (True, None, []),
    ],
)
def test_a_plugin_that_will_not_load_is_found(
    good: dict[str, Path],
    plugin_found: bool,
    allowed: str | None,
    expected: list[tuple[str, str]],
) -> None:
    where = Target(
        Version("0.32.0"),
        "cpu",
        ON_CPU.hardware,
        installed=True,
        plugin_found=plugin_found,
        plugins_allowed=allowed,
    )
    assert [(f.id, f.severity) for f in diagnose(good["rtn"], where)] == expected


# The real model's size


@pytest.fixture(scope="module")
def full_size() -> Survey:
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
    ],
    ids=lambda value: str(value.hardware) if isinstance(value, Target) else "",
)
def test_flash_on_the_hardware_that_the_project_names(
    full_size: Survey, where: Target, expected: set[str]
) -> None:
    found = examine(full_size, where)
    assert set(ids(found, "error", "warning")) == expected


@pytest.mark.parametrize("where", [ON_CPU, on("H200")])
def test_a_context_beyond_the_models_positions_is_no_matter_of_memory(
    good: dict[str, Path], where: Target
) -> None:
    found = ids(diagnose(good["rtn"], replace(where, max_model_len=8193)), "error", "warning")
    assert found == ["context-positions"]
    assert ids(diagnose(good["rtn"], replace(where, max_model_len=8192)), "error") == []


@pytest.mark.parametrize(
    ("gpu", "tp", "expected"),
    [
        ("RTX PRO 6000 Max-Q", 1, []),
        ("RTX PRO 6000 Max-Q", 2, ["vllm-50196"]),
        ("H200", 2, []),  # other kernels there
    ],
)
def test_a_rank_whose_share_of_an_expert_is_one_group_is_warned_of(
    good: dict[str, Path], gpu: str, tp: int, expected: list[str]
) -> None:
    found = ids(diagnose(good["rtn"], on(gpu, tp)), "warning")
    assert [id_ for id_ in found if id_ == "vllm-50196"] == expected


def test_flash_is_too_much_for_a_cpu(full_size: Survey) -> None:
    assert ids(examine(full_size, ON_CPU)) == ["memory-weights"]


def test_flash_weighs_what_the_published_checkpoint_weighs(full_size: Survey) -> None:
    # The Acti card: about 146 GB on disk, 143 of them in the base's four shards.
    in_gib = {
        place: sum(
            t.numel() * t.element_size()
            for name, t in full_size.tensors.items()
            if name.startswith("mtp.") == (place == "head")
        )
        / 2**30
        for place in ("base", "head")
    }
    assert in_gib["base"] + in_gib["head"] == pytest.approx(146, abs=1)
    assert in_gib["base"] == pytest.approx(142.5, abs=1)


def test_ranks_are_a_power_of_two_of_the_gpus_as_serve_takes_them() -> None:
    assert [find_target(gpu="H200", count=n).tp for n in (1, 2, 3, 6, 8)] == [1, 2, 2, 4, 8]


@pytest.mark.parametrize("count", [1, 3, 4, 8])
def test_doctor_and_serve_take_the_same_ranks(good: dict[str, Path], count: int) -> None:
    options = ServeOptions(good["rtn"])
    planned = make_plan(options, "auto", named_gpus("H200", count))
    where = on("H200", count, checkpoint=good["rtn"])
    assert where.tp == planned.options.num_ranks
    assert ids(diagnose(good["rtn"], where), "error") == []


def test_a_config_that_cannot_be_read_does_not_keep_doctor_from_saying_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v4", "o_groups": "many"}')
    where = on("H200", 3, checkpoint=tmp_path)
    assert where.tp == 2
    assert ids(diagnose(tmp_path, where)) == ["config-unusable"]


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
    assert "piecewise-graphs" in ids(rest)


def test_a_memory_that_the_cpu_shares_is_not_taken_whole(full_size: Survey) -> None:
    text = str(examine(full_size, on("GB10", 2)))
    assert "85% of 2x GB10" in text and "92%" not in text
