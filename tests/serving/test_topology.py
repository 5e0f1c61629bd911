import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving.topology import CPU, Hardware, find_gpus, named_hardware

from .conftest import install_gpus

MIB = 2**20


def test_machines_like_this_one_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, "NVIDIA H200", "NVIDIA H200", memory_mib=143771)
    assert str(find_gpus()) == "2x NVIDIA H200, 140.4 GiB, PCIe only"
    assert str(find_gpus(num_nodes=2)) == "4x NVIDIA H200, 140.4 GiB, 2 nodes"


@pytest.mark.parametrize(
    ("memory_mib", "expected"),
    [
        (None, Hardware("NVIDIA GB10", 1, 124610 * MIB, unified_memory=True, capability=(12, 1))),
        (122570, Hardware("NVIDIA GB10", 1, 122570 * MIB, unified_memory=True, capability=(12, 1))),
        (97871, Hardware("NVIDIA GH200 480GB", 1, 97871 * MIB)),
    ],
)
def test_what_a_driver_does_not_say_is_known_of_some_gpus(
    monkeypatch: pytest.MonkeyPatch, memory_mib: int | None, expected: Hardware
) -> None:
    install_gpus(monkeypatch, str(expected.gpu), memory_mib=memory_mib)
    assert find_gpus() == expected


@pytest.mark.parametrize(
    ("chosen", "count"), [("1", 1), ("0,2", 2), ("GPU-2, GPU-0", 2), ("1,-1,2", 1), (" 0,,1", 1)]
)
def test_only_the_gpus_that_vllm_will_see_count(
    monkeypatch: pytest.MonkeyPatch, chosen: str, count: int
) -> None:
    install_gpus(monkeypatch, "H200", "H200", "H200", memory_mib=143771)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert find_gpus().num_gpus == count


@pytest.mark.parametrize("chosen", [None, "0", "MIG-0", "MIG-0,MIG-1"])
def test_of_a_gpu_in_instances_cuda_shows_one(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
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
    TOLD,
    st.none() | st.tuples(st.integers(0, 20), st.integers(0, 9)),
    st.sets(st.sampled_from(PAIRS)),
    st.none() | st.text(),
)
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
