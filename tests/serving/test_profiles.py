"""How a profile is fitted to what is there; the whole output is in test_profiles_golden.py."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from mtp_graft.errors import GraftError
from mtp_graft.serving import room
from mtp_graft.serving.command import InstalledVllm, ServeOptions, build_command, vllm_elsewhere
from mtp_graft.serving.doctor.known_issues import ISSUES
from mtp_graft.serving.memory import kv_cache_bytes
from mtp_graft.serving.plan import Node, Plan, make_plan
from mtp_graft.serving.profiles import (
    GPU_ENVIRONMENT,
    MODEL_FLAGS,
    PCIE_ENVIRONMENT,
    PCIE_FLAGS,
    PROFILES,
)
from mtp_graft.serving.topology import CPU, Hardware, named_gpus

from .flash import CONFIG, cached_weights, write_flash
from .test_profiles_golden import quiet_environment  # noqa: F401

pytestmark = pytest.mark.usefixtures("quiet_environment", "quick_weights")
GPU_VLLM = vllm_elsewhere()
CPU_VLLM = InstalledVllm(Version("0.32.0"), "cpu", ("vllm", "serve"))
MAX_Q = named_gpus("RTX PRO 6000 Max-Q", 2)


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flash(tmp_path_factory.mktemp("flash") / "checkpoint")


@pytest.fixture
def quick_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "weights_bytes_per_rank", cached_weights)


def plan(
    checkpoint: Path,
    profile: str,
    hardware: Hardware = MAX_Q,
    vllm: InstalledVllm = GPU_VLLM,
    node: Node | None = None,
    **options: Any,
) -> Plan:
    return make_plan(ServeOptions(checkpoint, **options), profile, hardware, vllm, node)


def test_the_stand_in_has_the_size_that_the_seed_card_gives(flash: Path) -> None:
    head = (flash / "model-mtp-w4a16.safetensors").stat().st_size
    assert head == pytest.approx(3.55e9, rel=0.01)
    assert cached_weights(flash, 1) / 2**30 == pytest.approx(146, abs=1)


def test_the_profiles_are_the_seeds_table() -> None:
    table = {
        name: (p.max_model_len, p.max_num_seqs, p.gpu_memory_utilization)
        for name, p in PROFILES.items()
    }
    assert table["128k"] == (131072, 8, 0.90)
    assert table["256k"] == (262144, 4, 0.95)
    assert table["256k-2"] == (262144, 2, 0.93)
    assert table["524k"] == (524288, 3, 0.93)
    assert table["640k"][0] == 655360
    assert table["1m"][0] == CONFIG["max_position_embeddings"]


@pytest.mark.parametrize("profile", [*PROFILES, "auto"])
def test_a_shared_memory_is_filled_no_further_than_doctor_advises(
    flash: Path, profile: str
) -> None:
    advice = next(issue.cure for issue in ISSUES if issue.id == "vllm-46307")
    most = float(re.search(r"--gpu-memory-utilization ([\d.]+) or less", advice)[1])  # type: ignore[index]
    planned = plan(flash, profile, named_gpus("GB10", 2), node=Node(0, "192.0.2.1"))
    assert planned.options.gpu_memory_utilization == most == 0.85


def test_every_setting_has_a_reason_and_a_source_and_is_in_the_docs(repo_root: Path) -> None:
    page = (repo_root / "docs" / "serving.md").read_text()
    for setting in (*MODEL_FLAGS, *GPU_ENVIRONMENT, *PCIE_FLAGS, *PCIE_ENVIRONMENT):
        assert setting.why and setting.source
        assert setting.name in page, f"docs/serving.md does not mention {setting.name}"
    for name, profile in PROFILES.items():
        assert profile.why and profile.source
        row = f"| `{name}` | {profile.max_model_len:,} | {profile.max_num_seqs} |"
        assert row in page, f"docs/serving.md has no row {row}"


def test_without_a_profile_nothing_is_looked_at(vllm: Path, grafted: Path) -> None:
    argv = build_command(ServeOptions(grafted)).argv
    assert "--served-model-name" not in argv
    assert "--max-model-len" not in argv


def test_what_the_user_says_wins(flash: Path) -> None:
    chosen = plan(
        *(flash, "524k"),
        max_model_len=200000,
        max_num_seqs=1,
        gpu_memory_utilization=0.5,
        max_num_batched_tokens=4096,
        served_model_names=("mine",),
        tensor_parallel_size=1,
        environment={"NCCL_PROTO": "Simple"},
        hardware=replace(MAX_Q, memory_bytes=400 * 2**30),
    ).options
    assert chosen.max_model_len == 200000
    assert chosen.max_num_seqs == 1
    assert chosen.gpu_memory_utilization == 0.5
    assert chosen.max_num_batched_tokens == 4096
    assert chosen.served_model_names == ("mine",)
    assert chosen.tensor_parallel_size == 1
    assert chosen.environment["NCCL_PROTO"] == "Simple"


def test_a_variable_of_the_users_environment_is_left_alone_and_said(
    flash: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    chosen = plan(flash, "524k")
    assert "NCCL_ALGO" not in chosen.options.environment
    assert any("NCCL_ALGO=Tree" in note for note in chosen.notes)


def test_one_rank_needs_no_settings_for_many(flash: Path) -> None:
    chosen = plan(flash, "128k", Hardware("big", 1, 400 * 2**30)).options
    assert "--disable-custom-all-reduce" not in chosen.extra_args
    assert not any(name.startswith("NCCL") for name in chosen.environment)


@pytest.mark.parametrize(
    ("count", "ranks"),
    [(1, 1), (2, 2), (3, 2), (4, 4), (8, 8), (16, 8)],
)
def test_as_many_ranks_as_gpus_and_model_allow(flash: Path, count: int, ranks: int) -> None:
    """16 ranks would have half an output group each."""
    hardware = Hardware("big", count, 400 * 2**30, "nvlink")
    assert plan(flash, "524k", hardware).options.num_ranks == ranks


def test_more_ranks_than_gpus_is_an_error(flash: Path) -> None:
    with pytest.raises(GraftError, match="size 4 on 2x RTX PRO 6000 Max-Q"):
        plan(flash, "524k", tensor_parallel_size=4)


@pytest.mark.parametrize(
    ("ranks", "undivided"),
    [(3, "64 attention heads"), (16, "8 output groups")],
)
def test_ranks_asked_for_have_to_divide_the_model(flash: Path, ranks: int, undivided: str) -> None:
    hardware = Hardware("big", 16, 400 * 2**30, "nvlink")
    with pytest.raises(GraftError, match=f"size {ranks}: config.json has {undivided}"):
        plan(flash, "524k", hardware, tensor_parallel_size=ranks)


def test_ranks_asked_for_have_to_divide_the_scale_groups_on_a_cpu_too(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = with_config(tiny_model / "base", tmp_path / "wide", o_groups=4)
    with pytest.raises(GraftError, match="moe_intermediate_size 256 in groups of 128"):
        plan(folder, "auto", CPU, CPU_VLLM, tensor_parallel_size=4)
    chosen = plan(folder, "auto", CPU, CPU_VLLM, tensor_parallel_size=2)
    assert chosen.options.num_ranks == 2


def with_config(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    """Copy a checkpoint and change its config."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def memory_for(checkpoint: Path, tokens: int, utilization: float) -> int:
    """Return a MiB more than weights on two ranks, the cache and the 4 GiB for all else need."""
    needed = cached_weights(checkpoint, 2) + kv_cache_bytes(CONFIG, tokens, 16384)
    return int((needed + 4 * 2**30) / utilization) + 2**20


@pytest.mark.parametrize(("name", "utilization"), [("640k", 0.93), ("524k", 0.93), ("256k", 0.95)])
def test_auto_takes_the_longest_profile_that_fits(
    flash: Path, name: str, utilization: float
) -> None:
    length = PROFILES[name].max_model_len
    hardware = Hardware("odd", 2, memory_for(flash, length, utilization), "pcie")
    chosen = plan(flash, "auto", hardware)
    assert chosen.profile == name
    assert chosen.options.max_model_len == length
    assert chosen.options.max_num_seqs == 1
    with pytest.raises(GraftError, match="room for"):
        plan(flash, "1m", hardware)


def test_auto_cuts_the_context_to_what_fits_where_no_profile_does(flash: Path) -> None:
    """The 256k profiles take the most of the memory, so theirs gets furthest."""
    hardware = Hardware("small", 2, memory_for(flash, 4096, 0.95), "pcie")
    chosen = plan(flash, "auto", hardware)
    assert chosen.profile == "256k"
    assert chosen.options.max_model_len == 4096
    assert any("--max-model-len 4096, the profile has 262144" in note for note in chosen.notes)


@pytest.mark.parametrize("profile", ["524k", "auto"])
def test_a_context_asked_for_that_does_not_fit_is_refused_with_the_longest_that_does(
    flash: Path, profile: str
) -> None:
    hardware = Hardware("small", 2, memory_for(flash, 4096, 0.95), "pcie")
    asked = {"gpu_memory_utilization": 0.95}
    refused = r"--max-model-len 4608; .*room for 4096 tokens .*take --max-model-len 4096, or more"
    with pytest.raises(GraftError, match=refused):
        plan(flash, profile, hardware, max_model_len=4608, **asked)
    assert plan(flash, profile, hardware, max_model_len=4096, **asked).options.max_model_len == 4096
    with pytest.raises(GraftError, match=r"room for 0 tokens .*; take more ranks$"):
        plan(flash, profile, named_gpus("H100", 2), max_model_len=1024)


def test_a_share_that_was_asked_for_is_what_leaves_no_room(flash: Path) -> None:
    asked = r"no room for a context .*; take a larger --gpu-memory-utilization than 0\.52, or more"
    with pytest.raises(GraftError, match=asked):
        plan(flash, "auto", named_gpus("H200", 2), gpu_memory_utilization=0.52)


def test_a_cache_beyond_the_memory_is_refused(flash: Path, tiny_model: Path) -> None:
    hardware = named_gpus("H200", 2)
    refused = (
        r"--kv-cache-gib 500: beside weights of [\d.]+ GiB there is room for [\d.]+ on 2x H200"
    )
    with pytest.raises(GraftError, match=refused):
        plan(flash, "524k", hardware, kv_cache_gib=500)
    assert plan(flash, "524k", hardware, kv_cache_gib=40).options.kv_cache_gib == 40
    with pytest.raises(GraftError, match="--kv-cache-gib 1e"):
        plan(tiny_model / "base", "auto", CPU, CPU_VLLM, kv_cache_gib=1e6)


@pytest.mark.parametrize("profile", ["128k", "auto"])
def test_a_context_beyond_the_models_positions_is_refused(tiny_model: Path, profile: str) -> None:
    base = tiny_model / "base"
    refused = r"8193; the model has 8192 positions; take --max-model-len 8192$"
    with pytest.raises(GraftError, match=refused):
        plan(base, profile, CPU, CPU_VLLM, max_model_len=8193)
    with pytest.raises(GraftError, match=r"positions; take --max-model-len \d+$"):
        plan(base, profile, CPU, CPU_VLLM, max_model_len=8193, kv_cache_gib=0.05)
    assert plan(base, profile, CPU, CPU_VLLM, max_model_len=8192).options.max_model_len == 8192


def test_a_cache_that_was_asked_for_decides_the_longest_context(tiny_model: Path) -> None:
    small = {"kv_cache_gib": 0.05}
    refused = r"room for [1-9][0-9]+ tokens .*, or a larger --kv-cache-gib$"
    with pytest.raises(GraftError, match=refused):
        plan(tiny_model / "base", "128k", CPU, CPU_VLLM, max_model_len=8192, **small)


@pytest.mark.parametrize("profile", ["128k", "auto"])
def test_a_context_shorter_than_a_block_has_room(flash: Path, profile: str) -> None:
    assert plan(flash, profile, max_model_len=100).options.max_model_len == 100


def test_more_sequences_than_have_room_at_full_length_are_said(flash: Path) -> None:
    """A third sequence of 524,288 tokens would need 0.5 GiB more than two Max-Q have left."""
    assert any(
        "--max-num-seqs 3: of full length 2 have room" in n for n in plan(flash, "524k").notes
    )
    for fitting in (plan(flash, "524k", max_num_seqs=2), plan(flash, "auto")):
        assert not any("of full length" in note for note in fitting.notes)


@pytest.mark.parametrize(("profile", "count"), [("524k", 2), ("auto", 2), ("auto", 1)])
def test_no_room_is_an_error_that_has_the_estimate(flash: Path, profile: str, count: int) -> None:
    with pytest.raises(GraftError, match="GiB"):
        plan(flash, profile, named_gpus("H100", count))


def test_an_unknown_profile_is_an_error_that_names_the_known(flash: Path) -> None:
    with pytest.raises(GraftError, match="--profile 64k: unknown; expected one of 128k, 256k,"):
        plan(flash, "64k")


def test_a_cpu_gets_a_cache_in_bytes_and_none_of_the_gpus_settings(
    tiny_model: Path, tmp_path: Path
) -> None:
    chosen = plan(tiny_model / "base", "auto", CPU, CPU_VLLM).options
    assert chosen.max_model_len == 8192
    assert chosen.kv_cache_gib == 1
    assert chosen.gpu_memory_utilization is None
    assert chosen.max_num_batched_tokens is None
    assert chosen.environment == {} and chosen.extra_args == ()


def test_a_cpu_takes_more_cache_for_more_context(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_config(tiny_model / "base", tmp_path / "long", max_position_embeddings=2**20)
    config = json.loads((folder / "config.json").read_text())
    gib = plan(folder, "1m", CPU, CPU_VLLM).options.kv_cache_gib
    assert gib is not None
    assert kv_cache_bytes(config, 2**20, 2**20) <= gib * 2**30 < 40 * 2**30


def test_a_checkpoint_that_no_cpu_can_hold_is_refused(flash: Path) -> None:
    with pytest.raises(GraftError, match="a CPU is for small models"):
        plan(flash, "128k", CPU, CPU_VLLM)


def test_a_base_without_a_head_is_served_and_said(tiny_model: Path) -> None:
    chosen = plan(tiny_model / "base", "auto", CPU, CPU_VLLM)
    assert any("no drafting" in note for note in chosen.notes)


@pytest.mark.parametrize("key", ["quantization_config", "o_groups", "compress_ratios"])
def test_a_config_that_lacks_what_is_needed_is_an_error(
    tiny_model: Path, tmp_path: Path, key: str
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(tiny_model / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraftError, match=f"config.json: has no '{key}'"):
        plan(folder, "auto")


def test_what_drafts_is_said_and_a_copy_of_the_lm_head_takes_memory(flash: Path) -> None:
    usual = plan(flash, "auto")
    assert any("3 tokens drafted a step" in note for note in usual.notes)
    assert not any(
        "tokens drafted" in note for note in plan(flash, "auto", num_speculative_tokens=1).notes
    )
    drafting = {"draft_lm_head_quantization": "fp8", "draft_sample_method": "probabilistic"}
    other = plan(flash, "auto", **drafting)
    for name in drafting:
        assert any(note.startswith(name) for note in other.notes)
    left = [
        float(next(re.findall(r"([\d.]+) GiB left", n)[0] for n in p.notes if "GiB left" in n))
        for p in (usual, other)
    ]
    copy = CONFIG["vocab_size"] * CONFIG["hidden_size"] / 2 / 2**30  # on each of two ranks
    assert left[0] - left[1] == pytest.approx(copy, abs=0.11)


def test_several_machines_need_the_address_of_the_first(flash: Path) -> None:
    sparks = named_gpus("DGX Spark", 2)
    with pytest.raises(GraftError, match="address of the first of them as --master-addr"):
        plan(flash, "524k", sparks)
    with pytest.raises(GraftError, match="--node-rank 2; expected one below 2"):
        plan(flash, "524k", sparks, node=Node(2, "192.0.2.1"))
    with pytest.raises(GraftError, match="one machine"):
        plan(flash, "524k", node=Node(1, "192.0.2.1"))
    nodes = ("--nnodes", "2", "--node-rank")
    first = plan(flash, "524k", sparks, node=Node(0, "192.0.2.1")).options.extra_args
    assert first == (*nodes, "0", "--master-addr", "192.0.2.1")
    second = plan(flash, "524k", sparks, node=Node(1, "192.0.2.1")).options.extra_args
    assert second == (*nodes, "1", "--master-addr", "192.0.2.1", "--headless")


def test_an_estimate_for_another_cache_is_said_to_be_one(flash: Path) -> None:
    assert not any("cache in fp8" in note for note in plan(flash, "524k").notes)
    chosen = plan(flash, "524k", kv_cache_dtype="auto")
    assert any("cache in fp8, not in auto" in note for note in chosen.notes)


def test_users_own_arguments_come_last(flash: Path) -> None:
    arguments = plan(flash, "524k", extra_args=("--seed", "7")).options.extra_args
    assert arguments == ("--disable-custom-all-reduce", "--seed", "7")
