"""The committed example: its card's numbers are in its files, and no benchmark's data is."""

import json
import re
from pathlib import Path

from run_folder import ROOT
from tracing import reread, traced

EXAMPLES = ROOT / "examples"
RUN = EXAMPLES / "tiny-dsv4"
SIZES = RUN / "sizes.json"


def test_every_number_of_the_card_is_what_its_file_says() -> None:
    page = (RUN / "card/README.md").read_text()
    sizes, numbers = json.loads(SIZES.read_text()), traced(RUN)
    assert len(numbers) > 200
    for number in numbers:
        assert reread(number, RUN, sizes) == number["shown"], number
        assert number["shown"] in page


def test_sizes_are_of_files_that_are_left_out_and_those_of_the_bundled_base() -> None:
    base = ROOT / "models/tiny-dsv4/base"
    compared = 0
    for file, size in json.loads(SIZES.read_text()).items():
        assert not (RUN / file).exists()
        bundled = base / Path(file).name
        if bundled.suffix == ".safetensors" and bundled.exists():
            assert bundled.stat().st_size == size
            compared += 1
    assert compared == 3


def test_every_table_of_the_card_names_files_that_are_there() -> None:
    page = (RUN / "card/README.md").read_text()
    sources = re.findall(r"<sub>From (.*)\.</sub>", page)
    assert len(sources) > 10
    for file in re.findall(r"`([^`]+)`", " ".join(sources)):
        assert (RUN / file).exists(), file


def test_base_and_head_have_the_same_benchmarks() -> None:
    alone = {path.parent.name for path in EXAMPLES.glob("*-base/bench/*/result.json")}
    both = {path.parent.name for path in RUN.glob("bench/*/result.json")}
    assert alone == {"gsm8k", "humaneval", "mmlu", "capability", "workload"}
    assert both == alone | {"decode", "sweep"}


def test_of_a_wrong_answer_only_its_kind_is_kept() -> None:
    evals = ("gsm8k", "humaneval", "mmlu", "capability")
    results = [path for name in evals for path in EXAMPLES.glob(f"*/bench/{name}/result.json")]
    wrong = [failure for path in results for failure in json.loads(path.read_text())["failures"]]
    assert len(results) == 8 and len(wrong) > 100
    assert all(failure.keys() == {"id", "kind"} for failure in wrong)
