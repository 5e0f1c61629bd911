"""What the benchmark scripts compute, with known inputs, and that the pages say what they found."""

import importlib
import json
import subprocess
import sys
from collections import ChainMap
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str) -> Any:
    """Import a script of benchmarks/, which import each other by their bare names."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


def entry(layers: int, variant: str, k: int, step_ms: float) -> dict[str, Any]:
    place = {"layers": layers, "variant": variant, "k": k, "draft_lm_head": None, "requests": 1}
    place |= {"context": 1000}
    place |= {"fixed": False, "tensor_parallel_size": 1, "profile": None, "all_reduce": "vllm"}
    return {**place, "step_ms": {"median": step_ms}}


def test_steps_are_carried_on_through_two_numbers_of_layers() -> None:
    # base: 1 + 0.5 a layer; with the head: 2 + 0.6 a layer
    found = [entry(n, "base", 0, 1 + 0.5 * n) for n in (17, 35)]
    found += [entry(n, "int4", 1, 2 + 0.6 * n) for n in (17, 35)]
    (line,) = load("step_time").extrapolate(found, 43)
    assert (line["step_ms_base"], line["step_ms_mtp"]) == pytest.approx((22.5, 27.8))
    assert line["speed_up"]["0.7"] == pytest.approx(1.7 * 22.5 / 27.8)
    (measured,) = load("step_time").extrapolate([e for e in found if e["layers"] == 35], 35)
    assert (measured["step_ms_base"], measured["step_ms_mtp"]) == (18.5, 23.0)


def test_one_number_of_layers_or_no_base_is_not_extrapolated() -> None:
    step_time = load("step_time")
    base, mtp = entry(17, "base", 0, 4.0), entry(17, "int4", 1, 5.0)
    assert step_time.extrapolate([base, mtp], 43) == [] == step_time.pairs([mtp])
    [pair] = step_time.pairs([base, mtp])
    assert (pair["step_ms_base"], pair["step_ms_mtp"]) == (4.0, 5.0)


def test_only_steps_in_which_every_request_decodes_are_timed() -> None:
    engines = load("engines")
    alone = [engines.Step(t / 10, {"a": 1}) for t in range(3)]  # b is still being prefilled
    both = [engines.Step(1 + t / 100, {"a": 1, "b": 2}) for t in range(engines.SETTLING + 11)]
    late = [engines.Step(9.0, {"b": 2})]
    summary = engines.summarize_steps([*alone, *both, *late], 2)
    assert summary["steps"] == 10
    assert summary["step_ms"]["median"] == pytest.approx(10)
    assert summary["tokens_per_step"] == pytest.approx(1.5)
    with pytest.raises(ValueError, match="ask for more tokens"):
        engines.summarize_steps([*alone, *late], 1 + 1)


def test_stored_layers_stand_for_all_others_of_their_kind() -> None:
    engines = load("engines")
    assert [list(engines.copies(n, 9)) for n in range(5)] == [[], [], [], [5, 7], [6, 8]]
    ratios = load("synthetic_flash").FLASH["compress_ratios"]
    assert all(ratios[c] == ratios[n] for n in (3, 4) for c in engines.copies(n, 43))


def test_flash_width_has_the_tensors_of_the_bundled_base(tiny_model: Path) -> None:
    """The tiny model's own config must give exactly the bundled base's tensors."""
    from mtp_graft.checkpoint.shards import read_meta

    config = json.loads((tiny_model / "base/config.json").read_text())
    meta = read_meta(tiny_model / "base").items()
    layers = range(-1, config["num_hidden_layers"])
    made = ChainMap(*(load("flash_width").stored_shapes(config, layer) for layer in layers))
    assert made == {name: (tuple(t.shape), t.dtype) for name, t in meta}


def test_flips_count_against_the_margin_of_the_text() -> None:
    texts = load("texts")
    text = [{"tokens": [1, 2, 3], "margins": [0.1, 0.9, 2.0]}]
    found = texts.compare_forced(text, [[9, 9, 3]])
    assert (found["positions"], found["positions_with_margin"], found["flips"]) == (3, 2, 2)
    assert found["flips_with_margin"] == [{"prompt": 0, "position": 1, "margin": 0.9}]


def test_pages_are_what_the_result_files_say() -> None:
    command = [sys.executable, BENCHMARKS / "results_page.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
