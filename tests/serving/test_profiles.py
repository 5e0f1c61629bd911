"""How a profile is fitted to what is there; the whole output is in test_profiles_golden.py."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.errors import GraftError
from mtp_graft.serving import plan
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.memory import RESERVE_BYTES, kv_cache_bytes
from mtp_graft.serving.plan import Plan, make_plan
from mtp_graft.serving.profiles import PROFILES
from mtp_graft.serving.topology import CPU, Hardware, named_hardware

from .conftest import edit_config
from .flash import CONFIG, cached_weights
from .test_profiles_golden import quiet_environment  # noqa: F401

pytestmark = pytest.mark.usefixtures("quiet_environment", "quick_weights")
GIB = 2**30
MAX_Q = named_hardware("RTX PRO 6000 Max-Q", 2)
BIG = Hardware("big", 16, 400 * GIB, has_nvlink=True)


@pytest.fixture
def quick_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "weights_bytes_per_rank", cached_weights)


def fitted(
    checkpoint: Path, profile: str, hardware: Hardware = MAX_Q, *node: Any, **options: Any
) -> Plan:
    return make_plan(ServeOptions(checkpoint, **options), profile, hardware, *node)


def two_gpus(checkpoint: Path, tokens: int, utilization: float) -> Hardware:
    """Return GPUs with a MiB more than weights, 4 GiB for all else and a sequence need."""
    needed = cached_weights(checkpoint, 2) + kv_cache_bytes(CONFIG, tokens, 16384) + RESERVE_BYTES
    return Hardware("odd", 2, int(needed / utilization) + 2**20)


@pytest.fixture
def tiny(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to be changed."""
    return shutil.copytree(tiny_model / "base", tmp_path / "tiny")


def test_the_profiles_are_the_seeds_table() -> None:
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


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (2, 2), (3, 2), (8, 8), (16, 8)])
def test_as_many_ranks_as_gpus_and_model_allow(flash: Path, count: int, ranks: int) -> None:
    """16 ranks would have half an output group each; one needs no settings for many."""
    chosen = fitted(flash, "524k", replace(BIG, num_gpus=count)).options
    assert chosen.num_ranks == ranks
    assert "--disable-custom-all-reduce" not in chosen.extra_args
    assert not any(name.startswith("NCCL") for name in chosen.environment)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(3, "64 attention heads"), (16, "8 output groups"), (32, "32 on 16x big.*at most 16")],
)
def test_ranks_asked_for_have_to_divide_the_model(flash: Path, ranks: int, message: str) -> None:
    with pytest.raises(GraftError, match=message):
        fitted(flash, "524k", BIG, tensor_parallel_size=ranks)


def test_on_a_cpu_too_they_have_to_divide_the_scale_groups(tiny: Path) -> None:
    edit_config(tiny, o_groups=4)
    with pytest.raises(GraftError, match="moe_intermediate_size 256 in groups of 128"):
        fitted(tiny, "auto", CPU, tensor_parallel_size=4)
    assert fitted(tiny, "auto", CPU, tensor_parallel_size=2).options.num_ranks == 2


def test_auto_takes_the_profile_that_reaches_furthest_and_cuts_its_context(flash: Path) -> None:
    """At short contexts the 256k profiles take the most of the memory."""
    for length, share, profile in (
        (700160, 0.93, "1m"),
        (655360, 0.93, "640k"),
        (4096, 0.95, "256k"),
    ):
        hardware = two_gpus(flash, length, share)
        chosen = fitted(flash, "auto", hardware)
        assert (chosen.profile, chosen.options.gpu_memory_utilization) == (profile, share)
        assert chosen.options.max_model_len == length
        assert chosen.options.max_num_seqs == 8
    assert any("--max-model-len 4096" in note for note in chosen.notes)
    for profile in ("524k", "auto"):
        asked = {"gpu_memory_utilization": 0.95, "max_model_len": 4608}
        with pytest.raises(GraftError, match=r"4608 tokens has no room.*--max-model-len 4096"):
            fitted(flash, profile, hardware, **asked)
        fitting = fitted(flash, profile, hardware, **asked | {"max_model_len": 4096})
        assert fitting.options.max_model_len == 4096


@pytest.mark.parametrize(
    ("profile", "hardware", "options"),
    [
        ("524k", named_hardware("H100", 2), {}),
        ("auto", named_hardware("H100", 2), {}),
        ("1m", named_hardware("H200", 1), {}),
        ("auto", named_hardware("H200", 2), {"gpu_memory_utilization": 0.52}),
        ("128k", CPU, {}),
    ],
)
def test_no_room_is_an_error_that_has_the_estimate(
    flash: Path, profile: str, hardware: Hardware, options: dict[str, Any]
) -> None:
    with pytest.raises(GraftError, match=r"weights [\d.]+ GiB.*; take a smaller model"):
        fitted(flash, profile, hardware, **options)


@pytest.mark.parametrize("profile", ["128k", "auto"])
def test_a_context_beyond_the_models_positions_is_refused(tiny_model: Path, profile: str) -> None:
    base = tiny_model / "base"
    with pytest.raises(GraftError, match="the model has 8192 positions"):
        fitted(base, profile, CPU, max_model_len=8193)
    assert fitted(base, profile, CPU, max_model_len=8192).options.max_model_len == 8192


@pytest.mark.parametrize("key", ["quantization_config", "o_groups", "compress_ratios"])
def test_a_config_that_lacks_what_is_needed_is_an_error(tiny: Path, key: str) -> None:
    edit_config(tiny, **{key: None})
    with pytest.raises(GraftError, match="config"):
        fitted(tiny, "auto")


def test_several_machines_need_the_address_of_the_first(flash: Path) -> None:
    sparks = named_hardware("GB10", 2)
    for hardware, *node in ((sparks,), (sparks, 2, "192.0.2.1"), (MAX_Q, 1, "192.0.2.1")):
        with pytest.raises(GraftError, match="a rank below their number, and the address"):
            fitted(flash, "524k", hardware, *node)
