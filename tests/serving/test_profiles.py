"""How a profile is fitted to what is there; the whole output is in test_profiles_golden.py."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving import plan
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.memory import RESERVE_BYTES, kv_cache_bytes
from mtp_graft.serving.plan import Node, Plan, make_plan
from mtp_graft.serving.profiles import (
    ENVIRONMENT,
    GPU_ENVIRONMENT,
    MODEL_FLAGS,
    PCIE_ENVIRONMENT,
    PCIE_FLAGS,
    PROFILES,
    REASONS,
    UNIFIED_MEMORY_UTILIZATION,
)
from mtp_graft.serving.topology import CPU, Hardware, named_gpus

from .conftest import edit_config
from .flash import CONFIG, cached_weights
from .test_profiles_golden import quiet_environment  # noqa: F401

pytestmark = pytest.mark.usefixtures("quiet_environment", "quick_weights")
MAX_Q = named_gpus("RTX PRO 6000 Max-Q", 2)
GIB = 2**30


@pytest.fixture
def quick_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "weights_bytes_per_rank", cached_weights)


def fitted(
    checkpoint: Path,
    profile: str,
    hardware: Hardware = MAX_Q,
    node: Node | None = None,
    **options: Any,
) -> Plan:
    return make_plan(ServeOptions(checkpoint, **options), profile, hardware, node)


def two_gpus(checkpoint: Path, tokens: int, utilization: float) -> Hardware:
    """Return GPUs with a MiB more than weights, 4 GiB for all else and a sequence need."""
    needed = cached_weights(checkpoint, 2) + kv_cache_bytes(CONFIG, tokens, 16384) + RESERVE_BYTES
    return Hardware("odd", 2, int(needed / utilization) + 2**20, "pcie")


def test_the_stand_in_has_the_size_that_the_seed_card_gives(flash: Path) -> None:
    head = (flash / "model-mtp-w4a16.safetensors").stat().st_size
    assert head == pytest.approx(3.55e9, rel=0.01)
    assert cached_weights(flash, 1) / GIB == pytest.approx(146, abs=1)


def test_the_profiles_are_the_seeds_table_and_settings_have_reasons() -> None:
    assert {
        name: (p.max_model_len, p.max_num_seqs, p.gpu_memory_utilization)
        for name, p in PROFILES.items()
    } == {
        "128k": (131072, 8, 0.90),
        "256k": (262144, 4, 0.95),
        "256k-2": (262144, 2, 0.93),
        "524k": (524288, 3, 0.93),
        "640k": (655360, 2, 0.93),
        "1m": (CONFIG["max_position_embeddings"], 1, 0.93),
    }
    for settings in (MODEL_FLAGS, ENVIRONMENT, GPU_ENVIRONMENT, PCIE_FLAGS, PCIE_ENVIRONMENT):
        assert REASONS.keys() >= set(settings)


def test_what_the_user_says_wins(flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    asked: dict[str, Any] = {
        "max_model_len": 200000,
        "max_num_seqs": 1,
        "gpu_memory_utilization": 0.5,
        "max_num_batched_tokens": 4096,
        "served_model_names": ("mine",),
        "tensor_parallel_size": 2,
    }
    hardware = replace(MAX_Q, memory_bytes=400 * GIB)
    variables = {"environment": {"NCCL_PROTO": "Simple"}, "extra_args": ("--seed", "7")}
    chosen = fitted(flash, "524k", hardware, **asked, **variables)
    assert {name: getattr(chosen.options, name) for name in asked} == asked
    assert chosen.options.extra_args == ("--disable-custom-all-reduce", "--seed", "7")
    assert chosen.options.environment["NCCL_PROTO"] == "Simple"
    assert "NCCL_ALGO" not in chosen.options.environment
    assert any("NCCL_ALGO: the environment has Tree" in note for note in chosen.notes)


@pytest.mark.parametrize("profile", [*PROFILES, "auto"])
def test_a_memory_shared_with_the_cpu_is_not_filled(flash: Path, profile: str) -> None:
    planned = fitted(flash, profile, named_gpus("GB10", 2), Node(0, "192.0.2.1"))
    assert planned.options.gpu_memory_utilization == UNIFIED_MEMORY_UTILIZATION == 0.85


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (2, 2), (3, 2), (8, 8), (16, 8)])
def test_as_many_ranks_as_gpus_and_model_allow(flash: Path, count: int, ranks: int) -> None:
    """16 ranks would have half an output group each; one needs no settings for many."""
    chosen = fitted(flash, "524k", Hardware("big", count, 400 * GIB, "nvlink")).options
    assert chosen.num_ranks == ranks
    assert "--disable-custom-all-reduce" not in chosen.extra_args
    assert not any(name.startswith("NCCL") for name in chosen.environment)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(3, "64 attention heads"), (16, "8 output groups"), (32, "32 on 16x big.*at most 16")],
)
def test_ranks_asked_for_have_to_divide_the_model(flash: Path, ranks: int, message: str) -> None:
    with pytest.raises(GraftError, match=message):
        fitted(flash, "524k", Hardware("big", 16, 400 * GIB, "nvlink"), tensor_parallel_size=ranks)


def test_on_a_cpu_too_they_have_to_divide_the_scale_groups(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_model, tmp_path, o_groups=4)
    with pytest.raises(GraftError, match="moe_intermediate_size 256 in groups of 128"):
        fitted(folder, "auto", CPU, tensor_parallel_size=4)
    assert fitted(folder, "auto", CPU, tensor_parallel_size=2).options.num_ranks == 2


def changed(tiny_model: Path, tmp_path: Path, **changes: Any) -> Path:
    """Copy the base and change its config."""
    shutil.copytree(tiny_model / "base", tmp_path / "changed")
    edit_config(tmp_path / "changed", **changes)
    return tmp_path / "changed"


@pytest.mark.parametrize(("name", "utilization"), [("640k", 0.93), ("524k", 0.93), ("256k", 0.95)])
def test_auto_takes_the_longest_profile_that_fits(
    flash: Path, name: str, utilization: float
) -> None:
    length = PROFILES[name].max_model_len
    hardware = two_gpus(flash, length, utilization)
    chosen = fitted(flash, "auto", hardware)
    assert (chosen.profile, chosen.options.max_model_len) == (name, length)
    assert chosen.options.max_num_seqs == 1
    with pytest.raises(GraftError, match="a context of 1048576 tokens has no room"):
        fitted(flash, "1m", hardware)


def test_auto_cuts_the_context_to_what_fits_where_no_profile_does(flash: Path) -> None:
    """The 256k profiles take the most of the memory, so theirs gets furthest."""
    hardware = two_gpus(flash, 4096, 0.95)
    chosen = fitted(flash, "auto", hardware)
    assert (chosen.profile, chosen.options.max_model_len) == ("256k", 4096)
    assert any("--max-model-len 4096" in note for note in chosen.notes)
    for profile in ("524k", "auto"):
        asked = {"gpu_memory_utilization": 0.95, "max_model_len": 4608}
        with pytest.raises(GraftError, match=r"4608 tokens has no room.*--max-model-len 4096"):
            fitted(flash, profile, hardware, **asked)
        fitting = fitted(flash, profile, hardware, **asked | {"max_model_len": 4096})
        assert fitting.options.max_model_len == 4096
    assert fitted(flash, "auto", max_model_len=100).options.max_model_len == 100, "under a block"


@pytest.mark.parametrize(
    ("profile", "gpu", "count", "options"),
    [
        ("524k", "H100", 2, {}),
        ("auto", "H100", 2, {}),
        ("auto", "H100", 1, {}),
        ("auto", "H200", 2, {"gpu_memory_utilization": 0.52}),
        ("524k", "H200", 2, {"kv_cache_gib": 500}),
        ("524k", "H200", 2, {"kv_cache_gib": 1}),
    ],
)
def test_no_room_is_an_error_that_has_the_estimate(
    flash: Path, profile: str, gpu: str, count: int, options: dict[str, Any]
) -> None:
    with pytest.raises(GraftError, match=r"weights [\d.a-z ]+ GiB"):
        fitted(flash, profile, named_gpus(gpu, count), **options)


@pytest.mark.parametrize("profile", ["128k", "auto"])
def test_a_context_beyond_the_models_positions_is_refused(tiny_model: Path, profile: str) -> None:
    base = tiny_model / "base"
    with pytest.raises(GraftError, match="the model has 8192 positions"):
        fitted(base, profile, CPU, max_model_len=8193)
    assert fitted(base, profile, CPU, max_model_len=8192).options.max_model_len == 8192


def test_more_sequences_than_have_room_at_full_length_are_said(flash: Path) -> None:
    """A third sequence of 524,288 tokens would need 0.5 GiB more than two Max-Q have left."""
    said = [note for note in fitted(flash, "524k").notes if "of full length" in note]
    assert len(said) == 1 and "--max-num-seqs 3: of full length 2 have room" in said[0]
    for fitting in (fitted(flash, "524k", max_num_seqs=2), fitted(flash, "auto")):
        assert not any("of full length" in note for note in fitting.notes)


def test_an_unknown_profile_is_an_error_that_names_the_known(flash: Path) -> None:
    with pytest.raises(UsageError, match="--profile 64k: unknown; expected one of 128k, 256k,"):
        fitted(flash, "64k")


def test_a_cpu_gets_a_cache_in_bytes_and_none_of_the_gpus_settings(
    tiny_model: Path, tmp_path: Path
) -> None:
    chosen = fitted(tiny_model / "base", "auto", CPU).options
    assert (chosen.max_model_len, chosen.kv_cache_gib) == (8192, 1)
    assert chosen.gpu_memory_utilization is chosen.max_num_batched_tokens is None
    assert chosen.environment == {} and chosen.extra_args == ()
    long = fitted(changed(tiny_model, tmp_path, max_position_embeddings=2**20), "1m", CPU).options
    assert long.kv_cache_gib is not None and 1 < long.kv_cache_gib < 40, "more for more context"


def test_a_checkpoint_that_no_cpu_can_hold_is_refused(flash: Path) -> None:
    with pytest.raises(GraftError, match="smaller model"):
        fitted(flash, "128k", CPU)


@pytest.mark.parametrize("key", ["quantization_config", "o_groups", "compress_ratios"])
def test_a_config_that_lacks_what_is_needed_is_an_error(
    tiny_model: Path, tmp_path: Path, key: str
) -> None:
    folder = changed(tiny_model, tmp_path, **{key: None})
    with pytest.raises(GraftError, match=r"config\.json: "):
        fitted(folder, "auto")


def test_a_copy_of_the_lm_head_takes_memory(flash: Path) -> None:
    copy = CONFIG["vocab_size"] * CONFIG["hidden_size"] // 2  # on each of two ranks
    hardware = two_gpus(flash, 131072, 0.90)
    assert fitted(flash, "128k", hardware).profile == "128k"
    with pytest.raises(GraftError, match="no room"):
        fitted(flash, "128k", hardware, draft_lm_head_quantization="fp8")
    larger = replace(hardware, memory_bytes=hardware.memory_bytes + int(copy / 0.9))
    assert fitted(flash, "128k", larger, draft_lm_head_quantization="fp8").profile == "128k"


def test_several_machines_need_the_address_of_the_first(flash: Path) -> None:
    sparks = named_gpus("DGX Spark", 2)
    for hardware, node in (
        (sparks, Node()),
        (sparks, Node(2, "192.0.2.1")),
        (MAX_Q, Node(1, "192.0.2.1")),
    ):
        with pytest.raises(GraftError, match="a rank below their number, and the address"):
            fitted(flash, "524k", hardware, node)
