import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_graft.errors import GraftError
from mtp_graft.serving.topology import Hardware, find_gpus, named_gpus

LEGEND = "\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
Smi = Callable[..., Path]


def matrix(*rows: str) -> str:
    """Lay cells out as `nvidia-smi topo -m` does, underlined title and a network card included."""
    names = [f"GPU{i}" for i in range(len(rows))]
    title = "\t\x1b[4m" + "\t".join([*names, "NIC0", "CPU Affinity", "NUMA Affinity"]) + "\x1b[0m"
    lines = [f"{name}\t{row}\tPHB\t0-31\t0" for name, row in zip(names, rows, strict=True)]
    return "\n".join([title, *lines, "NIC0\t" + "PHB\t" * len(rows) + " X", LEGEND])


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Return a function that puts an `nvidia-smi` on PATH, alone."""

    def install(gpus: str, topology: str = "", status: int = 0) -> Path:
        script = tmp_path / "nvidia-smi"
        text = (
            f"#!{sys.executable}\nimport sys\nopen({str(tmp_path / 'asked')!r}, 'a').write("
            "' '.join(sys.argv[1:]) + '\\n')\n"
            f"print({topology!r} if 'topo' in sys.argv else {gpus!r})\nsys.exit({status})\n"
        )
        script.write_text(text)
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return tmp_path / "asked"

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


@pytest.mark.parametrize(
    ("rows", "link"),
    [
        (("X\tNV18", "NV18\tX"), "nvlink"),
        (("X\tNODE", "NODE\tX"), "pcie"),
        (("X\tPHB", "PHB\tX"), "pcie"),
        (("X\tNV4\tSYS", "NV4\tX\tSYS", "SYS\tSYS\tX"), "pcie"),
    ],
)
def test_two_gpus_without_nvlink_between_them_are_pcie_only(
    smi: Smi, rows: tuple[str, ...], link: str
) -> None:
    smi("\n".join(["NVIDIA H200, 143771"] * len(rows)), matrix(*rows))
    found = find_gpus()
    assert found == Hardware("NVIDIA H200", len(rows), 143771 * 2**20, link)  # type: ignore[arg-type]


def test_one_gpu_has_no_link(smi: Smi) -> None:
    smi("NVIDIA H200, 143771")
    assert find_gpus().link == "none"


def test_other_machines_are_taken_to_be_like_this_one(smi: Smi) -> None:
    smi("NVIDIA H200, 143771\nNVIDIA H200, 143771")
    found = find_gpus(num_nodes=2)
    assert (found.num_gpus, found.link, found.num_nodes) == (4, "network", 2)


def test_a_gpu_that_shares_the_machines_memory_is_looked_up(smi: Smi) -> None:
    smi("NVIDIA GB10, [N/A]")
    found = find_gpus()
    assert found.unified_memory
    assert found.memory_bytes == named_gpus("GB10", 1).memory_bytes


def test_it_shares_that_memory_also_where_its_driver_gives_a_number(smi: Smi) -> None:
    smi("NVIDIA GB10, 122570")
    found = find_gpus()
    assert found.unified_memory
    assert found.memory_bytes == 122570 * 2**20


def test_a_gpu_that_is_not_known_is_taken_as_its_driver_has_it(smi: Smi) -> None:
    smi("NVIDIA GH200 480GB, 97871")
    assert find_gpus() == Hardware("NVIDIA GH200 480GB", 1, 97871 * 2**20)


def test_a_gpu_that_nobody_knows_the_memory_of_is_no_wrong_option(smi: Smi) -> None:
    smi("NVIDIA Thor, [N/A]")
    with pytest.raises(GraftError, match=r"nvidia-smi: NVIDIA Thor has \[N/A\] of memory") as error:
        find_gpus()
    assert error.value.exit_status == 1


def test_only_the_gpus_that_vllm_will_see_count(smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    asked = smi("NVIDIA H200, 143771")
    find_gpus()
    assert "--id=1" in asked.read_text().splitlines()[0]


@pytest.mark.parametrize("gpus", ["NVIDIA H200, 143771\nNVIDIA H100, 81559", ""])
def test_gpus_of_two_kinds_and_none_are_errors(smi: Smi, gpus: str) -> None:
    smi(gpus)
    with pytest.raises(GraftError, match="expected GPUs of one kind"):
        find_gpus()


def test_no_driver_is_an_error_that_says_what_else_there_is(smi: Smi) -> None:
    with pytest.raises(GraftError, match=r"nvidia-smi .*failed.*--gpu NAME"):
        find_gpus()
    smi("no devices", status=9)
    with pytest.raises(GraftError, match="nvidia-smi"):
        find_gpus()


@pytest.mark.parametrize(
    ("name", "count", "link", "nodes"),
    [
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 2, "pcie", 1),
        ("RTX PRO 6000 Server", 2, "pcie", 1),
        ("H200", 8, "nvlink", 1),
        ("H200", 1, "none", 1),
        ("GB10", 2, "network", 2),
    ],
)
def test_a_gpu_by_name_has_its_usual_links(name: str, count: int, link: str, nodes: int) -> None:
    found = named_gpus(name, count)
    assert (found.num_gpus, found.link, found.num_nodes) == (count, link, nodes)


def test_gpus_that_cannot_be_shared_out_to_machines_are_an_error() -> None:
    with pytest.raises(GraftError, match="--count 3 in --nnodes 2"):
        named_gpus("H200", 3, 2)
