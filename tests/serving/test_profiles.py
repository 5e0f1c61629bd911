"""What hardware is there, how a profile is fitted to it, and `serve --dry-run` to the letter.

With MTP_GRAFT_WRITE_GOLDEN=1 what the golden files' commands print is written anew, for a review.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving import memory, plan
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.memory import RESERVE_BYTES, kv_cache_bytes
from mtp_graft.serving.plan import Plan, make_plan
from mtp_graft.serving.topology import CPU, Hardware, find_gpus, named_hardware

from . import flash as published
from .conftest import install, install_gpus, only_from
from .doctor_defects import set_config
from .flash import CONFIG

MIB = 2**20


def test_machines_like_this_one_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, "NVIDIA H200", "NVIDIA H200", memory_mib=143771)
    assert str(find_gpus()) == "2x NVIDIA H200, 140.4 GiB, PCIe only"
    assert str(find_gpus(num_nodes=2)) == "4x NVIDIA H200, 140.4 GiB, 2 nodes"


GB10 = Hardware("NVIDIA GB10", 1, 124610 * MIB, unified_memory=True, capability=(12, 1))
GH200 = Hardware("NVIDIA GH200 480GB", 1, 97871 * MIB)


@pytest.mark.parametrize(("memory_mib", "expected"), [(None, GB10), (97871, GH200)])
def test_gaps_filled(monkeypatch: pytest.MonkeyPatch, memory_mib: Any, expected: Hardware) -> None:
    install_gpus(monkeypatch, str(expected.gpu), memory_mib=memory_mib)
    assert find_gpus() == expected


@pytest.mark.parametrize(
    ("chosen", "count"), [("1", 1), ("0,2", 2), ("GPU-2, GPU-0", 2), ("1,-1,2", 1), (" 0,,1", 1)]
)
def test_only_visible_gpus_count(monkeypatch: pytest.MonkeyPatch, chosen: str, count: int) -> None:
    install_gpus(monkeypatch, "H200", "H200", "H200", memory_mib=143771)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert find_gpus().num_gpus == count


@pytest.mark.parametrize("chosen", [None, "0", "MIG-0", "MIG-0,MIG-1"])
def test_of_mig_parts_cuda_shows_one(monkeypatch: pytest.MonkeyPatch, chosen: str | None) -> None:
    whole, part = "NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB MIG 3g.40gb"
    given = {"memory_mib": 40192, "capability": (8, 0), "instances": (part, part)}
    install_gpus(monkeypatch, whole, whole, **given)  # type: ignore[arg-type]
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert find_gpus() == Hardware(part, 1, 40192 * MIB, capability=(8, 0))


def test_hidden_gpus_and_no_driver_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ("", "-1", "-1,0", ",0"):
        install_gpus(monkeypatch, "NVIDIA H200", memory_mib=143771)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        with pytest.raises(GraftError, match=rf"\(CUDA_VISIBLE_DEVICES {hidden}\): found no GPU"):
            find_gpus()
    install_gpus(monkeypatch, error="NVML Shared Library Not Found")
    with pytest.raises(GraftError, match=r"Library Not Found.*--gpu NAME"):
        find_gpus()


TOLD = st.sampled_from([None, 0, 1, 40192, 2**21])
PAIRS = [(a, b) for a in range(4) for b in range(a)]


@given(
    st.lists(st.sampled_from(["NVIDIA H200", "NVIDIA GB10", "Tesla T4", "é"]), max_size=4)
    | st.integers(1, 4).map(lambda count: ["NVIDIA H200"] * count),
    TOLD, st.none() | st.tuples(st.integers(0, 20), st.integers(0, 9)),
    st.sets(st.sampled_from(PAIRS)), st.none() | st.text(),
)  # fmt: skip
def test_whatever_a_driver_answers_is_hardware_or_one_error(
    names: list[str], memory: int | None, sm: tuple[int, int] | None,
    links: set[tuple[int, int]], error: str | None,
) -> None:  # fmt: skip
    both_ways = links | {(b, a) for a, b in links}
    with pytest.MonkeyPatch.context() as patch:
        given_ = {"memory_mib": memory, "nvlinks": both_ways, "error": error, "capability": sm}
        install_gpus(patch, *names, **given_)
        try:
            found = find_gpus()
        except GraftError as refused:
            assert error or (len(set(names)) != 1 and "GPUs of one kind" in str(refused))
            return
    assert not error and (found.gpu, found.num_gpus) == (names[0], len(names))
    assert not memory or found.memory_bytes == memory * MIB
    assert sm is None or found.capability == sm
    linked = [pair in links for pair in PAIRS if pair[0] < len(names)]
    assert found.has_nvlink == (linked != [] and all(linked))


def test_hardware_that_is_elsewhere_has_a_name() -> None:
    assert named_hardware("CPU") == CPU
    assert str(named_hardware("h200")) == "1x H200, 140.4 GiB"
    assert str(named_hardware("RTX PRO 6000 Max-Q", 2)).endswith("95.6 GiB, PCIe only")
    assert str(named_hardware("H100", 8)).endswith(", NVLink")
    assert named_hardware("GB10", 2).num_nodes == 2, "one in a machine"
    with pytest.raises(UsageError, match="H300: not a GPU known here; expected one of cpu, RTX"):
        named_hardware("H300")
    with pytest.raises(GraftError, match="--count 3 in --nnodes 2"):
        named_hardware("H200", 3, 2)


GIB = 2**30
MAX_Q = named_hardware("RTX PRO 6000 Max-Q", 2)
BIG = Hardware("big", 16, 400 * GIB, has_nvlink=True)


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU does not get into the output, nor do GPUs that whoever runs the tests chose."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def on_flash(flash: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DeepSeek-V4-Flash, whose 103,000 tensors are not counted anew each time."""
    monkeypatch.setattr(plan, "read_meta", lambda folder: folder)
    monkeypatch.setattr(memory, "weights_bytes", published.weights)
    return flash


def fit(checkpoint: Path, profile: str, hardware: Any = MAX_Q, *node: Any, **options: Any) -> Plan:
    return make_plan(ServeOptions(checkpoint, **options), profile, hardware, *node)


def two_gpus(checkpoint: Path, tokens: int, utilization: float) -> Hardware:
    """Return GPUs with a MiB more than weights, 4 GiB for all else and a sequence need."""
    needed = published.weights(checkpoint, 2) + kv_cache_bytes(CONFIG, tokens, 16384)
    return Hardware("odd", 2, int((needed + RESERVE_BYTES) / utilization) + 2**20)


@pytest.fixture
def tiny(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model / "base", tmp_path / "tiny")


def test_what_the_user_says_wins(on_flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    asked: dict[str, Any] = {"max_model_len": 200000, "max_num_seqs": 1, "tensor_parallel_size": 2}
    asked |= {"gpu_memory_utilization": 0.5, "max_num_batched_tokens": 4096}
    asked |= {"served_model_names": ("mine",)}
    hardware = replace(MAX_Q, memory_bytes=400 * GIB)
    variables = {"environment": {"NCCL_PROTO": "Simple"}, "extra_args": ("--seed", "7")}
    chosen = fit(on_flash, "524k", hardware, **asked, **variables)
    assert {name: getattr(chosen.options, name) for name in asked} == asked
    assert chosen.options.extra_args == ("--disable-custom-all-reduce", "--seed", "7")
    assert chosen.options.environment["NCCL_PROTO"] == "Simple"
    assert "NCCL_ALGO" not in chosen.options.environment
    assert any("NCCL_ALGO: the environment has Tree" in note for note in chosen.notes)


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (2, 2), (3, 2), (8, 8), (16, 8)])
def test_as_many_ranks_as_gpus_and_model_allow(on_flash: Path, count: int, ranks: int) -> None:
    """16 ranks would have half an output group each; one needs no settings for many."""
    chosen = fit(on_flash, "524k", replace(BIG, num_gpus=count)).options
    assert chosen.num_ranks == ranks
    assert "--disable-custom-all-reduce" not in chosen.extra_args
    assert not any(name.startswith("NCCL") for name in chosen.environment)


def test_ranks_asked_for_have_to_divide_the_model(flash: Path, tiny: Path) -> None:
    """On a CPU they have to divide the scale groups, too."""
    wrong = {3: "num_attention_heads", 16: "o_groups", 32: "32 on 16x big.*at most 16"}
    for ranks, message in wrong.items():
        with pytest.raises(GraftError, match=message):
            fit(flash, "524k", BIG, tensor_parallel_size=ranks)
    set_config("o_groups", 4)(tiny)
    with pytest.raises(GraftError, match="moe_intermediate_size"):
        fit(tiny, "auto", CPU, tensor_parallel_size=4)
    assert fit(tiny, "auto", CPU, tensor_parallel_size=2).options.num_ranks == 2


def test_auto_takes_the_profile_that_reaches_furthest_and_cuts_its_context(on_flash: Path) -> None:
    """At short contexts the 256k profiles take the most of the memory."""
    lengths = (700160, 0.93, "1m"), (655360, 0.93, "640k"), (4096, 0.95, "256k")
    for length, share, profile in lengths:
        hardware = two_gpus(on_flash, length, share)
        chosen = fit(on_flash, "auto", hardware)
        assert (chosen.profile, chosen.options.gpu_memory_utilization) == (profile, share)
        assert chosen.options.max_model_len == length
        assert chosen.options.max_num_seqs == 8
    assert any("--max-model-len 4096" in note for note in chosen.notes)
    for profile in ("524k", "auto"):
        asked = {"gpu_memory_utilization": 0.95, "max_model_len": 4608}
        with pytest.raises(GraftError, match=r"4608 tokens has no room.*--max-model-len 4096"):
            fit(on_flash, profile, hardware, **asked)
        fitting = fit(on_flash, profile, hardware, **asked | {"max_model_len": 4096})
        assert fitting.options.max_model_len == 4096


@pytest.mark.parametrize("profile", ["128k", "auto"])
def test_a_context_beyond_the_models_positions_is_refused(tiny_model: Path, profile: str) -> None:
    base = tiny_model / "base"
    with pytest.raises(GraftError, match="the model has 8192 positions"):
        fit(base, profile, CPU, max_model_len=8193)
    assert fit(base, profile, CPU, max_model_len=8192).options.max_model_len == 8192


@pytest.mark.parametrize("key", ["quantization_config", "o_groups", "compress_ratios"])
def test_a_config_that_lacks_what_is_needed_is_an_error(tiny: Path, key: str) -> None:
    set_config(key, None)(tiny)
    with pytest.raises(GraftError, match=f"config.*{key}"):
        fit(tiny, "auto")


def test_several_machines_need_the_address_of_the_first(on_flash: Path) -> None:
    sparks = named_hardware("GB10", 2)
    for hardware, *node in ((sparks,), (sparks, 2, "192.0.2.1"), (MAX_Q, 1, "192.0.2.1")):
        with pytest.raises(GraftError, match="a rank below their number, and the address"):
            fit(on_flash, "524k", hardware, *node)


GOLDEN = Path(__file__).parent / "golden"
ON_CPU, ON_MAX_Q = "cpu-tiny-auto", "--gpu 'RTX PRO 6000 Max-Q' --count 2"
COMMAND = "$ mtp-graft serve /model --dry-run "
Print = Callable[[Path, str], str]


@pytest.fixture
def dry_run(vllm: object, run_command: Callable[..., tuple[int, str, str]]) -> Print:
    """Return a function that gives what `serve --dry-run` prints, errors included."""

    def call(checkpoint: Path, words: str) -> str:
        _, out, errors = run_command("serve", checkpoint, "--dry-run", *shlex.split(words))
        return (errors + out).replace(sys.executable, "python").replace(str(checkpoint), "/model")

    return call


def golden(name: str) -> tuple[str, str]:
    """Return the options in a golden file's first line, and what is printed."""
    command, _, text = (GOLDEN / f"{name}.txt").read_text().partition("\n")
    return command.removeprefix(COMMAND), text


def compare(name: str, dry_run: Print, checkpoint: Path) -> None:
    words, text = golden(name)
    found = dry_run(checkpoint, words)
    if os.environ.get("MTP_GRAFT_WRITE_GOLDEN"):
        (GOLDEN / f"{name}.txt").write_text(f"{COMMAND}{words}\n{found}")
    assert found == text


@pytest.mark.parametrize("name", sorted({file.stem for file in GOLDEN.iterdir()} - {ON_CPU}))
def test_the_dry_run_is_the_golden_file(dry_run: Print, on_flash: Path, name: str) -> None:
    """The conservative one is Acti's validated command."""
    compare(name, dry_run, on_flash)


def test_the_dry_run_on_a_cpu_is_the_golden_file(dry_run: Print, spliced: dict[str, Path]) -> None:
    compare(ON_CPU, dry_run, spliced["mxfp4"])


def test_own_gpus_as_named(dry_run: Print, on_flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM is a CUDA build, and the driver tells of two cards on PCIe."""
    site = Path("cuda/site-packages")
    install(site, "vllm", "0.33.0")
    only_from(site, monkeypatch)
    card = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
    install_gpus(monkeypatch, card, card, memory_mib=97887)
    for words, name in (("--profile 524k", "524k"), ("", "auto"), (ON_MAX_Q, "auto")):
        printed = dry_run(on_flash, words).replace(card, "RTX PRO 6000 Max-Q")
        printed = printed.replace("python -m vllm.entrypoints.cli.main", "vllm")
        by_default = "# - no --profile given: auto, which took 1m; none leaves all to vLLM\n"
        assert (by_default in printed) is (name == "auto")
        assert printed.replace(by_default, "") == golden(f"max-q-x2-{name}")[1]
